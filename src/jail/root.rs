//! Gives a mount namespace an empty tmpfs as root, without the host's mounts.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
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
