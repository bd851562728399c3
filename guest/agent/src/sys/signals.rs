//! Signals: sent, blocked, ignored.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::process::Pid;

use super::check;

/// Sends any signal number, real-time ones included.
pub(crate) fn kill(pid: Pid, signal: u32) -> io::Result<()> {
    let signal = i32::try_from(signal).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: kill has no memory requirements; a `Pid` is positive, so exactly one process is meant.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Blocks SIGCHLD and makes it readable from the returned descriptor, which does not block.
pub(crate) fn open_child_signals() -> io::Result<OwnedFd> {
    let mut set = empty_signal_set();
    // SAFETY: `set` is an initialised signal set and SIGCHLD a signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    // SAFETY: `set` is initialised; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Unblocks every signal, as a program that is not the agent expects to start.
pub(crate) fn unblock_signals() {
    let set = empty_signal_set();
    // SAFETY: `set` is initialised; no old set is asked for. It cannot fail with SIG_SETMASK.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Gives SIGPIPE, which Rust ignores, its default action back: an ignored signal outlives execve(2).
pub(crate) fn restore_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Has the kernel reap this process's children as they end.
pub(crate) fn auto_reap_children() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD (sigaction(2), NOTES).
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Sleeps for good.
pub(crate) fn sleep_forever() -> ! {
    loop {
        // SAFETY: pause has no requirements.
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
