//! Standard streams: the pipes or the terminal of a process, and the pumps between them and the host.
//!
//! A pump moves the bytes of one stream in one direction. It never blocks. It buffers only bytes that it has read and
//! its sink has not accepted. While the sink is full, the pump does not read. So the source's pipe fills up, and its
//! writer blocks (back-pressure).
//!
//! The event loop runs the pumps; jobs get the process's ends. Nothing here depends on containers.

mod ends;
mod pump;

pub(crate) use ends::{AgentEnds, ProcessEnds};
pub(crate) use pump::{Progress, Pump};

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Sets the initial size of a new terminal, in columns and rows, and its owner. Returns the slave.
pub(crate) fn set_up_terminal(master: impl AsFd, size: Option<(u16, u16)>, uid: u32) -> io::Result<OwnedFd> {
    if let Some((columns, rows)) = size {
        resize_terminal(&master, columns, rows)?;
    }
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    Ok(slave)
}

/// The kernel sends SIGWINCH to the foreground processes if the size changes.
pub(crate) fn resize_terminal(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}
