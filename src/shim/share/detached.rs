//! Detached mounts: copies of mounts that are in no mount namespace until they are moved to a place (open_tree(2)).

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{MountAttrFlags, MountPropagationFlags, OpenTreeFlags},
};

use crate::{jail::syscalls::mount_setattr, oci::ReadOnly};

/// A detached copy of the mount at `path`, with the mounts below it if `recursive`.
pub(super) fn clone_mount(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// Restricts a mount that is to be shared, and all mounts below it: the host executes nothing of it, and a device node
/// that the guest makes must not open a device of the host.
pub(super) fn restrict(mount: BorrowedFd<'_>, read_only: ReadOnly) -> io::Result<()> {
    let mut attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if read_only == ReadOnly::All {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    mount_setattr(mount, attributes, MountPropagationFlags::PRIVATE, true)?;
    if read_only == ReadOnly::Top {
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        mount_setattr(mount, attributes, MountPropagationFlags::empty(), false)?;
    }
    Ok(())
}
