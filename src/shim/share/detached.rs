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
    clone(CWD, path, OpenTreeFlags::empty(), recursive)
}

/// Like [`clone_mount`], of the opened directory or file `source`.
pub(super) fn clone_mount_of(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    clone(source, Path::new(""), OpenTreeFlags::AT_EMPTY_PATH, recursive)
}

fn clone(directory: BorrowedFd<'_>, path: &Path, flags: OpenTreeFlags, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(directory, path, flags)?)
}

/// Restricts a mount that is to be shared, and all mounts below it: the host executes nothing of it, follows no
/// symbolic link in it, and opens no device by a device node in it.
pub(super) fn restrict(mount: BorrowedFd<'_>, read_only: ReadOnly) -> io::Result<()> {
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
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

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use nix::sched::{CloneFlags, unshare};
    use rustix::mount::{MountFlags, MoveMountFlags, mount, mount_change, move_mount};

    use super::*;

    #[test]
    fn shared_mounts_are_restricted() {
        let (source, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let below = source.path().join("below");
        fs::create_dir(&below).unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
        mount("tmpfs", source.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::create_dir(&below).unwrap();
        mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).unwrap();

        let detached = clone_mount(source.path(), true).unwrap();
        restrict(detached.as_fd(), ReadOnly::None).unwrap();

        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&detached, "", CWD, place.path(), flags).unwrap();
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        for path in [place.path().to_owned(), place.path().join("below")] {
            let line = table
                .lines()
                .find(|line| line.contains(&format!(" {} ", path.display())));
            let options: Vec<_> = line.unwrap().split(' ').nth(5).unwrap().split(',').collect();
            for option in ["rw", "nosuid", "nodev", "noexec", "nosymfollow"] {
                assert!(options.contains(&option), "{}: {options:?}", path.display());
            }
        }
    }
}
