//! Processes: fork, exec and exit, pids, descriptors, and process attributes.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

use super::check;

/// Gives the calling thread a root, a working directory and a mount namespace of its own.
#[cfg(test)]
pub(crate) fn unshare_file_systems() -> io::Result<()> {
    // SAFETY: unshare takes an integer, and neither flag affects a descriptor.
    check(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) }).map(drop)
}

/// Forks. Returns `None` in the child, which must end with [`exit_now`] and must not return to the event loop.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the agent has one thread, so the child may call any function.
    let pid = check(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid))
}

/// Forks a sibling: the new process is a child of the caller's parent, and starts in `cgroup`, an open directory.
/// Returns `None` in the new process.
///
/// The new process joins the pid namespace that the caller has set for its children.
pub(crate) fn fork_sibling_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    /// Defined here because libc's constant has a type of 32 bits, which cannot hold it (clone(2)).
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    fork_sibling(CLONE_INTO_CGROUP, cgroup.as_raw_fd().unsigned_abs().into())
}

/// Forks a sibling: the new process is a child of the caller's parent. Returns `None` in the new process.
pub(crate) fn fork_plain_sibling() -> io::Result<Option<Pid>> {
    fork_sibling(0, 0)
}

/// Forks a sibling: the new process is a child of the caller's parent, pid 1 of a new pid namespace, and has a new
/// mount namespace. Returns `None` in the new process.
pub(crate) fn fork_pid_namespace_init() -> io::Result<Option<Pid>> {
    const FLAGS: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    fork_sibling(FLAGS.unsigned_abs().into(), 0)
}

fn fork_sibling(flags: u64, cgroup: u64) -> io::Result<Option<Pid>> {
    const CLONE_PARENT: u64 = libc::CLONE_PARENT.unsigned_abs() as u64;
    // CLONE_PARENT requires an exit signal of 0: the new process uses the caller's.
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
    // SAFETY: `arguments` outlives the call. Without CLONE_VM the child gets a copy of the only thread's stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let pid = check(i32::try_from(pid).unwrap_or(-1))?;
    Ok(Pid::from_raw(pid))
}

/// Ends the process without running exit handlers (_exit(2)).
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes an integer.
    unsafe { libc::_exit(status) }
}

/// Ends this process after `seconds`, unless it has ended before (alarm(2)).
pub(crate) fn end_after(seconds: u32) {
    // SAFETY: alarm takes an integer.
    unsafe { libc::alarm(seconds) };
}

/// Executes a program in place of this one. Returns only on failure.
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

/// Converts a raw pid to a [`Pid`]. Returns `None` if it is 0 or too large.
pub(crate) fn to_pid(number: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(number).ok()?)
}

/// Converts a [`Pid`] to a raw pid.
pub(crate) fn raw_pid(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// Takes ownership of a descriptor that this program inherited through execve(2); `None` if it is not open. Call
/// this at most once for each number.
pub(crate) fn take_inherited_descriptor(number: i32) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no argument, and fails for a number that is not an open descriptor.
    let is_open = number > 2 && check(unsafe { libc::fcntl(number, libc::F_GETFD) }).is_ok();
    // SAFETY: the descriptor is open, and as it was inherited, nothing else in this process owns it.
    is_open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
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

/// Closes these descriptors of a forked child, which their owners must not use any more.
pub(crate) fn close_in_child(descriptors: &[BorrowedFd<'_>]) {
    for fd in descriptors {
        let number = fd.as_raw_fd().unsigned_abs();
        close_range(number, number);
    }
}

fn close_range(first: u32, last: u32) {
    // SAFETY: called only in a forked child, which does not use the owners of these descriptors any more.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Makes the memory of this process unreadable to other processes. Call this before joining the namespaces of a
/// container (PR_SET_DUMPABLE of prctl(2)).
pub(crate) fn set_undumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Makes this process the parent of its orphaned descendants. PID 1 does not need this call (PR_SET_CHILD_SUBREAPER of
/// prctl(2)).
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Makes `terminal` the controlling terminal of this process, which must be a session leader (TIOCSCTTY).
pub(crate) fn set_controlling_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}
