//! Standard streams: the process's side (pipes or a terminal) and the pumps between it and the host.
//!
//! A pump is one direction. It never blocks and holds at most what one read took and its sink did
//! not: a full sink stops the reading, so back-pressure reaches the writer at the other end.

mod ends;
mod pump;

pub(crate) use ends::{AgentEnds, ProcessEnds};
pub(crate) use pump::{Progress, Pump};

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Gives a new terminal its first size and its owner, the process's user. Returns the slave.
pub(crate) fn set_up_terminal(master: impl AsFd, size: Option<(u16, u16)>, uid: u32) -> io::Result<OwnedFd> {
    if let Some((columns, rows)) = size {
        resize_terminal(&master, columns, rows)?;
    }
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    Ok(slave)
}

/// Sets a terminal's size.
pub(crate) fn resize_terminal(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}
