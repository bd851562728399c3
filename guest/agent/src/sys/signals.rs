//! Signals: sending, blocking, dispositions.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::process::Pid;

use super::check;

/// Sends a signal to one process. `signal` may be a real-time signal.
pub(crate) fn kill(pid: Pid, signal: u32) -> io::Result<()> {
    let signal = i32::try_from(signal).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: kill takes only integers. A `Pid` is positive, so it names one process and not a group.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Blocks SIGCHLD, and returns a non-blocking signalfd(2) for it.
pub(crate) fn open_child_signals() -> io::Result<OwnedFd> {
    let mut set = empty_signal_set();
    // SAFETY: `set` is initialised, and SIGCHLD is a valid signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    // SAFETY: `set` is initialised; the old set is not requested.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: `set` is initialised; -1 requests a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Unblocks all signals: the signal mask survives execve(2), and programs expect an empty one.
pub(crate) fn unblock_signals() {
    let set = empty_signal_set();
    // SAFETY: `set` is initialised; the old set is not requested. SIG_SETMASK cannot fail.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Restores the default disposition of SIGPIPE. Rust programs ignore it, and execve(2) keeps ignored signals ignored.
pub(crate) fn restore_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Makes the kernel reap the children of this process (SIGCHLD in sigaction(2)).
pub(crate) fn auto_reap_children() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Sleeps until a signal ends the process.
pub(crate) fn sleep_forever() -> ! {
    loop {
        // SAFETY: pause takes no arguments.
        unsafe { libc::pause() };
    }
}

fn empty_signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}
