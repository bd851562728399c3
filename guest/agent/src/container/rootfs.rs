//! Puts a container's root file system in its place.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nutshell_linux::mount_options;
use nutshell_protocol::{Failure, Rootfs, SHARE_PATH};
use oci_spec::runtime::Mount;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::failure::{Context, FailureExt};
use crate::machine::{disk, share};

/// Mounts `rootfs` at `target`, an empty folder. The pod's shared folders are mounted afterwards if that or
/// `mounts` need them.
pub(crate) fn mount(rootfs: &Rootfs, mounts: &[Mount], target: &Path) -> Result<(), Failure> {
    let shared = |mount: &Mount| {
        mount
            .source()
            .as_ref()
            .is_some_and(|source| source.starts_with(SHARE_PATH))
    };
    if matches!(rootfs, Rootfs::Share { .. }) || mounts.iter().any(shared) {
        share::mount().context(|| "mount the pod's shared folders".to_owned())?;
    }
    match rootfs {
        Rootfs::Share { path } => bind_from_share(path, target),
        Rootfs::Disk {
            slot,
            filesystem,
            options,
        } => {
            let device = disk::find(*slot).context(|| format!("disk slot {slot}"))?;
            let (flags, data) = split_options(options);
            let data = CString::new(data).map_err(|_| Failure::invalid("a mount option of the rootfs holds a NUL"))?;
            rustix::mount::mount(&device, target, filesystem.as_str(), flags, data.as_c_str())
                .context(|| format!("mount {} ({filesystem}) as rootfs", device.display()))
        }
    }
}

/// Binds a folder of the share, which a container may have written to: no link is followed.
fn bind_from_share(path: &str, target: &Path) -> Result<(), Failure> {
    let clone = || {
        let share = rustix::fs::open(SHARE_PATH, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { "." } else { path };
        let folder = rustix::fs::openat2(&share, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&folder, c"", flags)?;
        rustix::mount::move_mount(&tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    clone().context(|| format!("bind {path:?} of the pod's shared folders as rootfs"))
}

/// Makes a process's working folder in the rootfs where it is missing, as runc does: images may name
/// one that they do not have.
pub(crate) fn create_working_directory(rootfs: &Path, cwd: &Path) -> io::Result<()> {
    let open = |folder: &OwnedFd, path: &Path| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(folder, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
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
            // A volume may hold the folder, or entering it says what is wrong.
            Err(_) => return Ok(()),
        }
    }
    Ok(())
}

/// Unmounts what [`mount`] mounted and removes the folder. Fine if there is nothing.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Something outside of the container still uses it: it goes when that ends.
            Err(Errno::BUSY) => rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Splits options as fstab has them into mount(2)'s flags and the file system's own.
fn split_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options {
        // The disk is a block device already: there is no loop device to set up.
        if !option.is_empty() && option != "loop" && !mount_options::apply(option, &mut flags) {
            data.push(option.as_str());
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_folder_is_made_inside_of_the_rootfs_only() {
        let outside = std::env::temp_dir().join(format!("agent-rootfs-{}", std::process::id()));
        let rootfs = outside.join("rootfs");
        fs::create_dir_all(rootfs.join("real")).unwrap();
        std::os::unix::fs::symlink("/real", rootfs.join("link")).unwrap();
        std::os::unix::fs::symlink("../../../..", rootfs.join("up")).unwrap();
        for cwd in ["/srv/app", "/link/a/b", "/up/c"] {
            create_working_directory(&rootfs, Path::new(cwd)).unwrap();
        }
        for made in ["srv/app", "real/a/b", "c"] {
            assert!(rootfs.join(made).is_dir(), "{made}");
        }
        assert!(!outside.join("c").exists());
        fs::remove_dir_all(outside).unwrap();
    }

    #[test]
    fn options_split_into_flags_and_the_rest() {
        let options = [
            "ro",
            "noatime",
            "discard",
            "nodev",
            "dev",
            "loop",
            "nolazytime",
            "data=ordered",
        ]
        .map(str::to_owned);
        let (flags, data) = split_options(&options);
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(data, "discard,data=ordered");
    }
}
