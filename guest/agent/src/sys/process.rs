//! Processes: fork, execute, end; their descriptors and properties.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

use super::check;

/// Forks. `None` in the child, which must end by [`exit_now`] and never return to the event loop.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the agent has one thread, so the child may call anything.
    let pid = check(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid))
}

/// Forks a brother: a child of the caller's parent, born in `cgroup`. `None` in the child.
///
/// The child joins the pid namespace that the caller set for its children.
pub(crate) fn fork_sibling_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    /// clone(2); the constant of this name in libc has too narrow a type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    fork_sibling(CLONE_INTO_CGROUP, cgroup.as_raw_fd().unsigned_abs().into())
}

/// Forks a brother: a child of the caller's parent, the first process of a new pid namespace, in a
/// mount namespace of its own. `None` in the child.
pub(crate) fn fork_pid_namespace_init() -> io::Result<Option<Pid>> {
    const FLAGS: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    fork_sibling(FLAGS.unsigned_abs().into(), 0)
}

fn fork_sibling(flags: u64, cgroup: u64) -> io::Result<Option<Pid>> {
    const CLONE_PARENT: u64 = libc::CLONE_PARENT.unsigned_abs() as u64;
    // With CLONE_PARENT the exit signal must be none: it is the one of the caller.
    let arguments = libc::clone_args {
        flags: flags | CLONE_PARENT,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    // SAFETY: `arguments` outlives the call; without CLONE_VM the child has a copy of the one thread's stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let pid = check(i32::try_from(pid).unwrap_or(-1))?;
    Ok(Pid::from_raw(pid))
}

/// Ends the process without running anything that the agent registered to run at its end.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` has no requirements.
    unsafe { libc::_exit(status) }
}

/// Becomes another program. Returns only where that fails.
pub(crate) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: `path` and the null-terminated arrays of C strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// The process that a number means.
pub(crate) fn to_pid(number: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(number).ok()?)
}

/// The number of a process.
pub(crate) fn raw_pid(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// A descriptor that the program which executed this one left open, to be called once for a number.
pub(crate) fn take_inherited_descriptor(number: i32) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no argument and fails for a number that is no open descriptor.
    let open = number > 2 && check(unsafe { libc::fcntl(number, libc::F_GETFD) }).is_ok();
    // SAFETY: it is open, and nobody else in this process owns what came from another.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor above standard error that is not in `keep`.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept {
        if fd > from {
            close_range(from, fd - 1);
        }
        from = from.max(fd + 1);
    }
    close_range(from, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: only called in a forked child that never touches the owners of these descriptors again.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Makes the memory of this process unreadable for processes of containers that it is about to join.
pub(crate) fn set_undumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Inherits the children of descendants that end, as PID 1 would (only of use where we are not).
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Makes `terminal` the controlling terminal of this process, which leads its session.
pub(crate) fn set_controlling_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}
