//! The disk in an image, and its copy-on-write file, which receives the guest's writes.
//!
//! An image may hold anything: its files are opened below its root, without following links, and only if they are
//! regular files. Nothing here reads their bytes.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::{
    fs::{Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use uuid::Uuid;

use super::{
    error::VmError,
    regular_file::{OpenError, describe, open_regular},
};
use crate::{
    control::BaseFormat,
    oci::VmImage,
    shim::{machine::DiskImage, share::mount_image},
};

/// The directory of an image with its disk (KubeVirt's containerDisk).
const DIRECTORY: &str = "disk";

/// The copy-on-write file of the image's disk, in the root directory of the snapshot. It counts as part of the
/// snapshot, and is removed with it.
pub(super) const WRITES: &str = ".nutshell-disk-writes";

/// The maximum number of names that an error lists.
const MAX_LISTED_NAMES: usize = 3;

const HOST_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The values of `F_RDLCK`, `F_WRLCK` and `SEEK_SET` (fcntl.h, stdio.h), with the types of the fields of `flock`.
const READ_LOCK: libc::c_short = 0;
const WRITE_LOCK: libc::c_short = 1;
const FROM_START: libc::c_short = 0;

/// Links are refused, and so are mounts below the root.
pub(super) const WITHIN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// The root directory of an image, in a mount that no other process sees.
#[derive(Debug)]
pub(crate) struct ImageRoot(OwnedFd);

impl ImageRoot {
    /// Mounts the files of an image. Blocks on its file system.
    pub(crate) fn mount(image: &VmImage, bundle_rootfs: &Path) -> Result<Self, VmError> {
        Ok(Self(mount_image(&image.0, bundle_rootfs)?))
    }

    /// Opens the disk of the image. `None` if the image has no directory `/disk`. Blocks on its file system.
    ///
    /// # Errors
    ///
    /// `/disk` does not contain exactly one regular file, that file cannot be opened, or the copy-on-write file cannot
    /// be created in the snapshot or is in use.
    pub(crate) fn open_disk(&self) -> Result<Option<DiskImage>, VmError> {
        let Some((path, base)) = open_base(self.0.as_fd(), Path::new("/"))? else {
            return Ok(None);
        };
        self.with_writes(path, base, BaseFormat::Detected, WRITES).map(Some)
    }

    /// The disk with the base image `base`, whose writes go to the file `writes` in the snapshot.
    pub(super) fn with_writes(
        &self,
        path: PathBuf,
        base: File,
        format: BaseFormat,
        writes: &str,
    ) -> Result<DiskImage, VmError> {
        Ok(DiskImage {
            format,
            path,
            base: base.into(),
            writes: open_writes(self.0.as_fd(), writes)?.into(),
            host_boot: read_host_boot()?,
        })
    }
}

/// Opens the only file in the directory `disk` of `root`, whose path is `at` in messages. `None` if there is no such
/// directory.
pub(super) fn open_base(root: BorrowedFd<'_>, at: &Path) -> Result<Option<(PathBuf, File)>, VmError> {
    let shown = at.join(DIRECTORY);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat2(root, DIRECTORY, flags, Mode::empty(), WITHIN_ROOT) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(Errno::LOOP) => {
            return Err(VmError::Image {
                path: shown,
                reason: "it is a symbolic link, not a directory".to_owned(),
            });
        }
        opened => opened.map_err(disk_error(&shown, "open the directory"))?,
    };
    open_only_file(directory.as_fd(), &shown).map(Some)
}

/// Opens the only file in `directory`, whose path is `at` in messages.
pub(super) fn open_only_file(directory: BorrowedFd<'_>, at: &Path) -> Result<(PathBuf, File), VmError> {
    let name = only_entry(directory).map_err(disk_error(at, "list the directory"))?;
    let name = name.map_err(|reason| VmError::Image {
        path: at.to_owned(),
        reason,
    })?;
    let path = at.join(OsStr::from_bytes(&name));
    match open_regular(directory, name.as_slice(), WITHIN_ROOT, OFlags::RDONLY) {
        Ok(base) => Ok((path, base)),
        Err(OpenError::System(errno)) => Err(disk_error(&path, "open it")(errno)),
        Err(error @ OpenError::NotRegular(_)) => Err(VmError::Image {
            path,
            reason: error.to_string(),
        }),
    }
}

/// The name of the only entry of a directory, or the reason why there is none.
fn only_entry(directory: BorrowedFd<'_>) -> rustix::io::Result<Result<Vec<u8>, String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_owned();
        if name != b"." && name != b".." {
            names.push(name);
        }
        if names.len() > MAX_LISTED_NAMES {
            break;
        }
    }
    Ok(match names.len() {
        0 => Err("it is empty, and must contain the disk, one regular file".to_owned()),
        1 => Ok(names.remove(0)),
        _ => {
            names.sort();
            let mut listed: Vec<_> = names
                .iter()
                .map(|name| String::from_utf8_lossy(name).escape_debug().to_string())
                .collect();
            if listed.len() > MAX_LISTED_NAMES {
                listed.truncate(MAX_LISTED_NAMES);
                listed.push("…".to_owned());
            }
            Err(format!(
                "it must contain the disk, one regular file, and contains {}",
                listed.join(", ")
            ))
        }
    })
}

/// Opens and locks the copy-on-write file of a snapshot. The first start of the container creates it.
fn open_writes(root: BorrowedFd<'_>, name: &str) -> Result<File, VmError> {
    let path = Path::new("/").join(name);
    let failed = |step| disk_error(&path, step);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let writes = rustix::fs::openat2(root, name, flags, Mode::RUSR | Mode::WUSR, WITHIN_ROOT)
        .map_err(failed("create the file for the disk's writes in the snapshot"))?;
    let status = rustix::fs::fstat(&writes).map_err(failed("read its type"))?;
    let kind = FileType::from_raw_mode(status.st_mode);
    if kind != FileType::RegularFile {
        let source = io::Error::other(format!("{}, not a regular file", describe(kind)));
        return Err(VmError::Disk {
            path,
            step: "open the file for the disk's writes",
            source,
        });
    }
    let writes = File::from(writes);
    lock(&writes, Lock::Exclusive).map_err(failed("lock it (another virtual machine uses this snapshot)"))?;
    Ok(writes)
}

/// A lock of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// The file is read: it can have several such locks.
    Shared,
    /// The file is written: it has no other lock.
    Exclusive,
}

/// Locks a file. The lock lasts until all descriptors of this open file description are closed, also those of the vmm.
pub(super) fn lock(file: &File, kind: Lock) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: match kind {
            Lock::Shared => READ_LOCK,
            Lock::Exclusive => WRITE_LOCK,
        },
        l_whence: FROM_START,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    Ok(())
}

/// Converts the error of a system call to an error of the disk at `path`. `step` is a verb with its object.
pub(super) fn disk_error(path: &Path, step: &'static str) -> impl FnOnce(Errno) -> VmError + use<> {
    let path = path.to_owned();
    move |errno| VmError::Disk {
        path,
        step,
        source: errno.into(),
    }
}

/// The host's boot ID.
fn read_host_boot() -> Result<[u8; 16], VmError> {
    let failed = |reason: String| VmError::HostBoot {
        path: HOST_BOOT_ID,
        reason,
    };
    let text = std::fs::read_to_string(HOST_BOOT_ID).map_err(|error| failed(error.to_string()))?;
    let id = Uuid::try_parse(text.trim()).map_err(|error| failed(error.to_string()))?;
    Ok(id.into_bytes())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Read,
        os::unix::fs::{FileExt, symlink},
    };

    use nix::{sys::stat::Mode as NixMode, unistd::mkfifo};

    use super::*;

    fn image(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("disk")).unwrap();
        for name in files {
            fs::write(root.path().join("disk").join(name), name).unwrap();
        }
        root
    }

    fn open(root: &tempfile::TempDir) -> Result<Option<(PathBuf, File)>, String> {
        let root = File::open(root.path()).unwrap();
        open_base(root.as_fd(), Path::new("/")).map_err(|error| error.to_string())
    }

    #[test]
    fn only_file_in_the_directory_is_the_disk() {
        let root = image(&["debian.qcow2"]);
        let (path, mut base) = open(&root).unwrap().unwrap();
        let mut text = String::new();
        base.read_to_string(&mut text).unwrap();
        assert_eq!(
            (path.as_path(), text.as_str()),
            (Path::new("/disk/debian.qcow2"), "debian.qcow2")
        );
    }

    #[test]
    fn base_image_is_opened_without_write_access_cve_2020_2025() {
        let (_, base) = open(&image(&["debian.raw"])).unwrap().unwrap();
        let error = base.write_all_at(b"guest", 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn image_without_the_directory_has_no_disk() {
        let root = tempfile::tempdir().unwrap();
        assert!(open(&root).unwrap().is_none());
        fs::write(root.path().join("disk"), "a file").unwrap();
        assert!(open(&root).unwrap().is_none());
    }

    #[test]
    fn anything_but_one_regular_file_is_refused_with_its_name() {
        let empty = image(&[]);
        let two = image(&["a.raw", "b.raw"]);
        let five = image(&["1", "2", "3", "4", "5"]);
        let link = image(&[]);
        symlink("/etc/passwd", link.path().join("disk/link.raw")).unwrap();
        let fifo = image(&[]);
        mkfifo(&fifo.path().join("disk/fifo.raw"), NixMode::S_IRWXU).unwrap();
        let directory = image(&[]);
        fs::create_dir(directory.path().join("disk/sub")).unwrap();
        let linked = tempfile::tempdir().unwrap();
        symlink("/", linked.path().join("disk")).unwrap();
        for (root, expected) in [
            (empty, "/disk of the image: it is empty"),
            (two, "and contains a.raw, b.raw"),
            (five, "…"),
            (
                link,
                "/disk/link.raw of the image: it is a symbolic link, not a regular file",
            ),
            (fifo, "/disk/fifo.raw of the image: it is a fifo, not a regular file"),
            (
                directory,
                "/disk/sub of the image: it is a directory, not a regular file",
            ),
            (linked, "/disk of the image: it is a symbolic link"),
        ] {
            let error = open(&root).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn file_for_writes_is_created_once_and_locked() {
        let root = tempfile::tempdir().unwrap();
        let directory = File::open(root.path()).unwrap();
        let writes = open_writes(directory.as_fd(), WRITES).unwrap();
        writes.set_len(7).unwrap();

        let error = open_writes(directory.as_fd(), WRITES).unwrap_err().to_string();

        assert!(error.contains("another virtual machine uses this snapshot"), "{error}");
        drop(writes);
        assert_eq!(
            open_writes(directory.as_fd(), WRITES)
                .unwrap()
                .metadata()
                .unwrap()
                .len(),
            7
        );
    }

    #[test]
    fn file_for_writes_is_never_a_link_or_a_fifo_cve_2026_13218() {
        let root = tempfile::tempdir().unwrap();
        let directory = File::open(root.path()).unwrap();
        symlink("/tmp/elsewhere", root.path().join(WRITES)).unwrap();
        open_writes(directory.as_fd(), WRITES).unwrap_err();
        fs::remove_file(root.path().join(WRITES)).unwrap();
        mkfifo(&root.path().join(WRITES), NixMode::S_IRWXU).unwrap();
        let error = open_writes(directory.as_fd(), WRITES).unwrap_err().to_string();
        assert!(error.contains("a fifo, not a regular file"), "{error}");
    }

    #[test]
    fn host_boot_id_is_readable() {
        assert_ne!(read_host_boot().unwrap(), [0; 16]);
    }
}
