//! The option `tmpcopyup` of a tmpfs: the tmpfs starts with a copy of the directory that it covers, as with runc.
//!
//! libcontainer does not know the option, and nothing can run between its mounts. So the tmpfs is mounted and filled
//! in advance, and libcontainer binds it.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nutshell_linux::mount_options;
use nutshell_protocol::{Failure, MOUNT_OPTIONS};
use oci_spec::runtime::{Linux, LinuxIdMapping, Mount};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::mount::MountFlags;

use crate::container::spec::outer_id;
use crate::failure::{Context, at_step};

/// How deep directories may be nested in a directory that is copied.
const MAX_DEPTH: usize = 500;

/// The names of the mount points of filled file systems in the bundle: this prefix and a number.
const NAME_PREFIX: &str = "tmpfs";

/// The filled file systems of a container that is being created. A drop unmounts them from the bundle; the container
/// keeps its own mounts of them.
#[derive(Debug, Default)]
pub(crate) struct FilledMounts {
    paths: Vec<PathBuf>,
}

impl Drop for FilledMounts {
    fn drop(&mut self) {
        for path in &self.paths {
            // After a failure, the removal of the bundle tries again.
            let _ = super::unmount(path);
        }
    }
}

/// Unmounts the filled file systems in `bundle` that a killed job has left there.
pub(crate) fn unmount_filled(bundle: &Path) -> io::Result<()> {
    for entry in fs::read_dir(bundle).into_iter().flatten() {
        let entry = entry?;
        if entry.file_name().as_bytes().starts_with(NAME_PREFIX.as_bytes()) {
            super::unmount(&entry.path())?;
        }
    }
    Ok(())
}

/// Replaces each tmpfs of `mounts` that has the option `tmpcopyup` by a bind mount of a filled tmpfs, which is mounted
/// in `bundle`. The destinations of `mounts` have no symbolic links.
pub(crate) fn fill_mounts(
    bundle: &Path,
    rootfs: &Path,
    linux: &Linux,
    mounts: &mut [Mount],
) -> Result<FilledMounts, Failure> {
    let mut filled = FilledMounts::default();
    for index in 0..mounts.len() {
        let (earlier, mount) = mounts.split_at_mut(index);
        let Some(mount) = mount.first_mut() else { continue };
        if mount.typ().as_deref() != Some("tmpfs") {
            continue;
        }
        let mut options = mount.options().clone().unwrap_or_default();
        let copies_up = options
            .iter()
            .rfind(|option| matches!(option.as_str(), "tmpcopyup" | "notmpcopyup"))
            .is_some_and(|option| option == "tmpcopyup");
        options.retain(|option| !matches!(option.as_str(), "tmpcopyup" | "notmpcopyup"));
        if copies_up {
            let destination = mount.destination();
            let target = bundle.join(format!("{NAME_PREFIX}{index}"));
            let mut fill = || {
                let covered = open_covered(rootfs, earlier, destination)?;
                let root = mount_tmpfs(&target, linux, &options, &mut filled)?;
                covered.map_or(Ok(()), |covered| copy_directory(covered.as_fd(), root.as_fd(), 0))
            };
            fill().context(|| format!("tmpcopyup: copy {} to a tmpfs", destination.display()))?;
            options.retain(|option| is_mount_option(option));
            options.push("rbind".to_owned());
            mount.set_typ(Some("bind".to_owned())).set_source(Some(target));
        }
        mount.set_options(Some(options));
    }
    Ok(filled)
}

/// Opens the directory that a mount at `destination` covers. `None` if there is none, or it is in a file system of the
/// kernel, which has no files yet.
fn open_covered(rootfs: &Path, earlier: &[Mount], destination: &Path) -> io::Result<Option<OwnedFd>> {
    let below = earlier
        .iter()
        .rev()
        .find_map(|mount| Some((mount, destination.strip_prefix(mount.destination()).ok()?)));
    let (top, path) = match below {
        None => (rootfs, destination),
        Some((mount, path)) => match (mount.typ().as_deref(), mount.source()) {
            (Some("bind"), Some(source)) => (source.as_path(), path),
            _ => return Ok(None),
        },
    };
    let top = rustix::fs::open(top, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(top, path, flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

/// Mounts a tmpfs with `options`, writable, and opens its root.
fn mount_tmpfs(target: &Path, linux: &Linux, options: &[String], filled: &mut FilledMounts) -> io::Result<OwnedFd> {
    let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
    // The kernel would take these as ids of the guest's initial user namespace.
    let (mut uid, mut gid) = (0, 0);
    for option in options {
        let id = |text: &str| text.parse().map_err(io::Error::other).map_err(at_step(option.clone()));
        if let Some(text) = option.strip_prefix("uid=") {
            uid = id(text)?;
        } else if let Some(text) = option.strip_prefix("gid=") {
            gid = id(text)?;
        } else if !mount_options::apply(option, &mut flags) && is_data(option) {
            data.push(option.as_str());
        }
    }
    flags.remove(MountFlags::RDONLY);
    fs::create_dir_all(target)?;
    filled.paths.push(target.to_owned());
    let data = CString::new(data.join(","))?;
    rustix::mount::mount("tmpfs", target, "tmpfs", flags, data.as_c_str())?;
    let map = |mappings: &Option<Vec<LinuxIdMapping>>, id| outer_id(mappings.as_deref(), id);
    let owner = Uid::from_raw(map(linux.uid_mappings(), uid));
    let group = Gid::from_raw(map(linux.gid_mappings(), gid));
    rustix::fs::chownat(CWD, target, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    open_directory(CWD, target)
}

fn is_mount_option(option: &str) -> bool {
    mount_options::apply(option, &mut MountFlags::empty()) || !is_data(option)
}

/// Whether an option that is not one of [`mount_options`] is for the file system. The shim announces the others.
fn is_data(option: &str) -> bool {
    !MOUNT_OPTIONS.contains(&option) && !matches!(option, "shared" | "rshared")
}

/// Opens a directory that may be changed meanwhile, by another container that shares it.
fn open_directory(parent: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Copies the entries of a directory with their owners and modes.
fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!(
            "directories are nested deeper than {MAX_DEPTH}"
        )));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name, depth).map_err(at_step(name.to_string_lossy().into_owned()))?;
        }
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let status = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
    let kind = FileType::from_raw_mode(status.st_mode);
    match kind {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, mode)?;
            let (from, to) = (open_directory(from, name)?, open_directory(to, name)?);
            copy_directory(from.as_fd(), to.as_fd(), depth + 1)?;
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target.as_c_str(), to, name)?;
        }
        FileType::RegularFile => copy_file(from, to, name)?,
        _ => rustix::fs::mknodat(to, name, kind, mode, status.st_rdev)?,
    }
    set_owner(to, name, &status)?;
    if kind != FileType::Symlink {
        // After the owner, because a new owner clears the set-user-ID bit.
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    Ok(())
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // With NONBLOCK, this does not wait for a writer if the file has become a FIFO.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut from = File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut to = File::from(rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut from, &mut to).map(drop)
}

fn set_owner(directory: BorrowedFd<'_>, name: &CStr, status: &Stat) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chownat(directory, name, Some(owner), Some(group), flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};

    fn mount(kind: &str, destination: &str, source: &str, options: &[&str]) -> Mount {
        let mount = serde_json::json!({"type": kind, "destination": destination, "source": source, "options": options});
        serde_json::from_value(mount).unwrap()
    }

    /// A root file system and an empty bundle.
    fn folders() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (rootfs, bundle) = (folder.path().join("rootfs"), folder.path().join("bundle"));
        fs::create_dir_all(rootfs.join("etc/below")).unwrap();
        fs::create_dir(&bundle).unwrap();
        (folder, rootfs, bundle)
    }

    #[test]
    fn entries_are_copied_with_owner_and_mode() {
        let (_folder, rootfs, bundle) = folders();
        let etc = rootfs.join("etc");
        fs::write(etc.join("below/file"), "text").unwrap();
        lchown(etc.join("below/file"), Some(7), Some(8)).unwrap();
        fs::set_permissions(etc.join("below/file"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(etc.join("below"), fs::Permissions::from_mode(0o1700)).unwrap();
        symlink("/nowhere", etc.join("link")).unwrap();
        lchown(etc.join("link"), Some(9), Some(9)).unwrap();
        rustix::fs::mknodat(CWD, etc.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let options = ["nosuid", "ro", "rprivate", "size=1m", "mode=750", "uid=5", "tmpcopyup"];
        let mut mounts = [mount("tmpfs", "/etc", "tmpfs", &options)];

        let filled = fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts).unwrap();

        let copy = mounts[0].source().clone().unwrap();
        assert_eq!(mounts[0].typ().as_deref(), Some("bind"));
        let options = mounts[0].options().clone().unwrap();
        assert_eq!(options, ["nosuid", "ro", "rprivate", "rbind"]);
        let status = |name: &str| fs::symlink_metadata(copy.join(name)).unwrap();
        let owner_and_mode = |name| (status(name).uid(), status(name).gid(), status(name).mode() & 0o7777);
        assert_eq!(owner_and_mode(""), (5, 0, 0o750));
        assert_eq!(owner_and_mode("below"), (0, 0, 0o1700));
        assert_eq!(owner_and_mode("below/file"), (7, 8, 0o4755));
        assert_eq!(fs::read_to_string(copy.join("below/file")).unwrap(), "text");
        assert_eq!(fs::read_link(copy.join("link")).unwrap(), Path::new("/nowhere"));
        assert_eq!(status("link").uid(), 9);
        assert!(status("fifo").file_type().is_fifo());
        drop(filled);
        assert!(!copy.exists());
    }

    #[test]
    fn file_systems_that_a_killed_job_leaves_can_be_removed() {
        let (_folder, rootfs, bundle) = folders();
        let mut mounts = [mount("tmpfs", "/etc", "tmpfs", &["tmpcopyup"])];
        let filled = fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts).unwrap();
        std::mem::forget(filled);
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 1);
        for _ in 0..2 {
            unmount_filled(&bundle).unwrap();
            assert_eq!(fs::read_dir(&bundle).unwrap().count(), 0);
        }
        unmount_filled(Path::new("/no/such/bundle")).unwrap();
    }

    #[test]
    fn files_are_those_of_the_mount_below() {
        let (folder, rootfs, bundle) = folders();
        let volume = folder.path().join("volume");
        fs::create_dir_all(volume.join("below")).unwrap();
        fs::write(volume.join("below/file"), "volume").unwrap();
        let source = volume.to_str().unwrap();
        for (mut mounts, expected) in [
            (
                vec![
                    mount("bind", "/etc", source, &["rbind"]),
                    mount("tmpfs", "/etc/below", "tmpfs", &["tmpcopyup"]),
                    mount("tmpfs", "/etc/below", "tmpfs", &["tmpcopyup"]),
                ],
                Some("volume"),
            ),
            (
                vec![
                    mount("tmpfs", "/etc", "tmpfs", &[]),
                    mount("tmpfs", "/etc/below", "tmpfs", &["tmpcopyup"]),
                ],
                None,
            ),
            (vec![mount("tmpfs", "/missing", "tmpfs", &["tmpcopyup"])], None),
        ] {
            let _filled = fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts).unwrap();
            let copy = mounts.last().unwrap().source().clone().unwrap();
            let text = fs::read_to_string(copy.join("file")).ok();
            assert_eq!(text.as_deref(), expected, "{mounts:?}");
        }
    }

    #[test]
    fn mount_without_the_option_stays_a_tmpfs() {
        let (_folder, rootfs, bundle) = folders();
        for options in [&["size=1m"][..], &["tmpcopyup", "size=1m", "notmpcopyup"][..]] {
            let mut mounts = [mount("tmpfs", "/etc", "tmpfs", options)];
            fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts).unwrap();
            assert_eq!(mounts[0].typ().as_deref(), Some("tmpfs"));
            assert_eq!(mounts[0].options().clone().unwrap(), ["size=1m"]);
        }
    }

    #[test]
    fn options_that_do_not_belong_to_the_file_system_are_left_to_the_mount() {
        let (_folder, rootfs, bundle) = folders();
        for option in MOUNT_OPTIONS.into_iter().chain(["shared", "rshared"]) {
            let mut mounts = [mount("tmpfs", "/etc", "tmpfs", &["tmpcopyup", option])];
            let filled = fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts);
            filled.unwrap_or_else(|failure| panic!("{option}: {}", failure.message));
            let options = mounts[0].options().clone().unwrap();
            assert_eq!(options, [option, "rbind"]);
        }
    }

    #[test]
    fn too_small_tmpfs_is_an_error_that_names_the_file_and_leaves_nothing() {
        let (_folder, rootfs, bundle) = folders();
        fs::write(rootfs.join("etc/below/large"), [1; 65536]).unwrap();
        let mut mounts = [mount("tmpfs", "/etc", "tmpfs", &["size=4k", "tmpcopyup"])];
        let failure = fill_mounts(&bundle, &rootfs, &Linux::default(), &mut mounts).unwrap_err();
        for part in ["tmpcopyup", "/etc", "below: large", "No space left"] {
            assert!(failure.message.contains(part), "{}", failure.message);
        }
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 0);
    }
}
