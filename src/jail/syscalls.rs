//! The system calls that neither rustix nor nix has. Nothing else may live here.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use rustix::mount::{MountAttrFlags, MountPropagationFlags};

/// Closes every descriptor from `first` to `last`, both included (close_range(2)).
///
/// For a process that has just started: whoever owned one of these descriptors owns a dead number
/// then, which is no matter of memory but of wrong files.
pub(crate) fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    let [first, last] = [first, last].map(|fd| libc::c_uint::try_from(fd).map_err(io::Error::other));
    // SAFETY: takes numbers only. `jail::enter`, the only caller, runs before anything of this
    // process has opened a descriptor, beside those that it excludes.
    match unsafe { libc::close_range(first?, last?, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds `set` to the attributes of the mount at `mount`, and of all mounts below it if `recursive`,
/// and makes their propagation `propagation` unless that is empty (mount_setattr(2), Linux 5.12).
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    propagation: MountPropagationFlags,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: u64::from(set.bits()),
        attr_clr: 0,
        propagation: u64::from(propagation.bits()),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, and the kernel reads `attributes` up to the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
