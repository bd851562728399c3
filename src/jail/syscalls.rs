//! System calls that neither rustix nor nix has. Nothing else belongs here.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    ptr,
};

use rustix::{
    mount::{MountAttrFlags, MountPropagationFlags},
    process::Pid,
};

/// Closes all descriptors from `first` to `last` inclusive (close_range(2)).
///
/// Only for a process that has just started: code that owns one of these descriptors would later use or close an
/// unrelated file with the same number.
pub(crate) fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    let [first, last] = [first, last].map(|fd| libc::c_uint::try_from(fd).map_err(io::Error::other));
    // SAFETY: the call takes numbers only. `jail::enter`, the only caller, runs before this process has opened any
    // descriptor, except those that it excludes.
    match unsafe { libc::close_range(first?, last?, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds `set` to the attributes of `mount`, and sets its propagation unless `propagation` is empty (mount_setattr(2),
/// Linux 5.12). `recursive` includes all mounts below it.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    propagation: MountPropagationFlags,
    recursive: bool,
) -> io::Result<()> {
    set_attributes(
        mount,
        &libc::mount_attr {
            attr_set: u64::from(set.bits()),
            attr_clr: 0,
            propagation: u64::from(propagation.bits()),
            userns_fd: 0,
        },
        recursive,
    )
}

/// Removes `clear` from the attributes of `mount` (mount_setattr(2), Linux 5.12).
pub(crate) fn clear_mount_attributes(mount: BorrowedFd<'_>, clear: MountAttrFlags) -> io::Result<()> {
    set_attributes(
        mount,
        &libc::mount_attr {
            attr_set: 0,
            attr_clr: u64::from(clear.bits()),
            propagation: 0,
            userns_fd: 0,
        },
        false,
    )
}

/// Maps the ids of the files in the detached `mount` as `user_namespace` does (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
/// `recursive` includes all mounts below it.
pub(crate) fn map_ids(mount: BorrowedFd<'_>, user_namespace: impl AsFd, recursive: bool) -> io::Result<()> {
    set_attributes(
        mount,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::from(user_namespace.as_fd().as_raw_fd().unsigned_abs()),
        },
        recursive,
    )
}

fn set_attributes(mount: BorrowedFd<'_>, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, and the kernel reads `attributes` up to the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(attributes),
            size_of_val(attributes),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks a process into a new user namespace that has no mappings yet. The process only waits to be killed. If
/// nothing else kills it, the kernel does when the calling thread ends.
pub(crate) fn fork_into_user_namespace() -> io::Result<Pid> {
    let parent = rustix::process::getpid().as_raw_pid();
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    let (stack, unused) = (0_usize, 0_usize);
    // SAFETY: without CLONE_VM and without a stack the child continues as a copy of this thread with its own memory.
    // Locks that other threads held are never unlocked in that copy, so the child only makes system calls.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, stack, unused, unused, unused) };
    if pid == 0 {
        loop {
            // SAFETY: these calls take numbers only, and are async-signal-safe.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // A parent that died earlier sends no signal.
                if libc::getppid() != parent {
                    libc::_exit(1);
                }
                libc::pause();
            }
        }
    }
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0);
    pid.and_then(Pid::from_raw).ok_or_else(io::Error::last_os_error)
}

/// Adds a seccomp filter to the calling thread (seccomp(2)). Needs `no_new_privs`.
pub(crate) fn install_seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    let flags: libc::c_ulong = 0;
    // SAFETY: the kernel reads the program, which is valid for its length, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            ptr::from_ref(&program),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
