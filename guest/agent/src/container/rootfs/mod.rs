//! A container's root file system.
//!
//! Belongs here: mounting and unmounting it, which [`layers`] does for one that is assembled from several file systems;
//! and changes of the spec's mounts that depend on its files: [`mount_targets`] and [`copy_up`]. Does not belong here:
//! making these mounts, which libcontainer does. The jobs that create, enter and delete a container call it.

mod beneath;
mod copy_up;
mod layers;
mod mount_targets;
mod mounting;

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nutshell_protocol::{Failure, Rootfs, SHARE_PATH};
use oci_spec::runtime::Mount;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

pub(crate) use self::copy_up::{FilledMounts, fill_mounts, unmount_filled};
pub(crate) use self::layers::unmount_layers;
pub(crate) use self::mount_targets::adapt_mounts;
use self::mounting::split_options;
pub(crate) use self::mounting::unmount;
use crate::failure::{Context, FailureExt};
use crate::machine::{disk, share};

/// Mounts `rootfs` at `target`, an empty directory. If `rootfs` or `mounts` need the pod's shared directories, it
/// mounts those first. `pod_member` is the id of a container that other containers may share directories with.
pub(crate) fn mount(rootfs: &Rootfs, mounts: &[Mount], target: &Path, pod_member: Option<&str>) -> Result<(), Failure> {
    let sources = || mounts.iter().filter_map(|mount| mount.source().as_deref());
    if matches!(rootfs, Rootfs::Share { .. }) || sources().any(|source| source.starts_with(SHARE_PATH)) {
        share::mount().context(|| "mount the pod's shared directories".to_owned())?;
    }
    if let Some(container) = pod_member {
        for source in sources() {
            share::mount_common(source, container)
                .context(|| format!("mount {} of the pod's shared directories", source.display()))?;
        }
    }
    match rootfs {
        Rootfs::Share { path } => bind_from_share(path, target),
        Rootfs::Disk {
            slot,
            filesystem,
            options,
        } => {
            let device = disk::find(*slot).context(|| format!("find the disk in disk slot {slot}"))?;
            let (flags, data) = split_options(options);
            let data =
                CString::new(data).map_err(|_| Failure::invalid("a mount option of the rootfs contains a NUL byte"))?;
            rustix::mount::mount(&device, target, filesystem.as_str(), flags, data.as_c_str())
                .context(|| format!("mount {} ({filesystem}) as rootfs", device.display()))
        }
        Rootfs::Layers {
            slot,
            parts,
            layers,
            root,
        } => {
            let device = disk::find(*slot).context(|| format!("find the disk in disk slot {slot}"))?;
            layers::mount_layers(&device, parts, layers, root, target)
        }
    }
}

/// Bind-mounts a directory of the share. Containers may write to the share, so no symbolic link is followed.
fn bind_from_share(path: &str, target: &Path) -> Result<(), Failure> {
    let clone = || {
        let share = rustix::fs::open(SHARE_PATH, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { "." } else { path };
        let directory = rustix::fs::openat2(&share, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&directory, c"", flags)?;
        rustix::mount::move_mount(&tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    clone().context(|| format!("bind {path:?} of the pod's shared directories as rootfs"))
}

/// Creates the working directory of a process if it is missing in the rootfs, as runc does: an image may name one that
/// it does not contain. Symbolic links do not lead out of `rootfs`.
pub(crate) fn create_working_directory(rootfs: &Path, cwd: &Path) -> io::Result<()> {
    let open = |directory: &OwnedFd, path: &Path| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    };
    let root = rustix::fs::open(
        rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if open(&root, cwd).is_ok() {
        return Ok(());
    }
    let mut path = PathBuf::from("/");
    for part in cwd.components().filter(|part| matches!(part, Component::Normal(_))) {
        let parent = open(&root, &path)?;
        path.push(part);
        match rustix::fs::mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            // The directory may be in a volume, which is mounted later. If not, the later chdir(2) fails.
            Err(_) => return Ok(()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn working_directory_is_created_only_inside_the_rootfs_kata_13587() {
        let outside = std::env::temp_dir().join(format!("agent-rootfs-{}", std::process::id()));
        let rootfs = outside.join("rootfs");
        fs::create_dir_all(rootfs.join("real")).unwrap();
        std::os::unix::fs::symlink("/real", rootfs.join("link")).unwrap();
        std::os::unix::fs::symlink("../../../..", rootfs.join("up")).unwrap();
        for cwd in ["/srv/app", "/link/a/b", "/up/c"] {
            create_working_directory(&rootfs, Path::new(cwd)).unwrap();
        }
        for path in ["srv/app", "real/a/b", "c"] {
            assert!(rootfs.join(path).is_dir(), "{path}");
        }
        assert!(!outside.join("c").exists());
        fs::remove_dir_all(outside).unwrap();
    }
}
