//! Gives a mount namespace an empty tmpfs as root, without the host's mounts.

use std::{
    io,
    os::fd::{IntoRawFd, OwnedFd},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
        unmount,
    },
};

use super::error::{FailedStep, step};

/// Access to the new root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// The file system itself is read-only.
    ReadOnly,
    /// Directories and mount points can be created, up to a small size.
    ReadWrite,
}

/// Replaces the root of the calling thread's mount namespace by an empty tmpfs, and unmounts everything else. The new
/// root is then the current directory. No other process may be in the namespace.
pub(crate) fn pivot_into_empty(access: Access) -> Result<(), FailedStep> {
    // Otherwise the mounts and unmounts below would propagate to the namespace that this one was copied from.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(step("make mounts private"))?;
    let tmpfs = make_tmpfs(access).map_err(step("make an empty root"))?;
    move_mount(&tmpfs, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(step("mount the empty root"))?;
    rustix::process::fchdir(&tmpfs).map_err(step("enter the empty root"))?;
    // This stacks the old root on top of the new one, and "." then means the old one
    // (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").map_err(step("pivot into the empty root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("unmount the host"))?;
    rustix::process::chdir("/").map_err(step("enter the empty root"))
}

/// Changes the root of the calling process to a copy of the mount at its root, without the mounts below. The working
/// directory becomes the old root.
///
/// The kernel refuses a new user namespace, in which a process has all capabilities, to a process whose root is not that
/// of its mount namespace (`current_chrooted` in fs/namespace.c).
pub(crate) fn leave_namespace_root() -> Result<(), FailedStep> {
    let failed = || step("leave the root of the mount namespace");
    rustix::process::chdir("/").map_err(failed())?;
    let old_root = openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed())?;
    let copy = open_tree(
        CWD,
        "/",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(failed())?;
    rustix::process::fchdir(&copy).map_err(failed())?;
    rustix::process::chroot(".").map_err(failed())?;
    rustix::process::fchdir(&old_root).map_err(failed())?;
    // Closing it unmounts the copy, which waits for an RCU grace period. The end of the process does that.
    let _ = copy.into_raw_fd();
    Ok(())
}

/// Makes an empty tmpfs that is not mounted anywhere yet.
fn make_tmpfs(access: Access) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "nutshell")?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_set_string(&context, "size", "64k")?;
    if access == Access::ReadOnly {
        fsconfig_set_flag(&context, "ro")?;
    }
    fsconfig_create(&context)?;
    let mut attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if access == Access::ReadOnly {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
