//! Disks in volumes of a pod, and block devices of a pod.
//!
//! A volume may belong to any user, and several pods may mount it. Files are opened below its root, without
//! following links and with the permissions of the container's user, and a disk that is written is locked.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat},
    io::Errno,
};

use super::{
    disk::{ImageRoot, Lock, WITHIN_ROOT, WRITES, disk_error, lock, open_base, open_only_file},
    error::VmError,
    regular_file::{OpenError, open_regular},
    seed::{self, CURRENT_VERSION},
};
use crate::{
    control::BaseFormat,
    oci::{DiskContent, DiskSource, FileUser, VmDisk},
    shim::{
        blocking::DropOffThread,
        machine::{BootDisk, DiskFile, DiskImage, PlainDisk},
    },
};

/// The raw disk in a volume, as KubeVirt names it.
const RAW_DISK: &CStr = c"disk.img";

/// A disk that is open for all boots of the machine.
#[derive(Debug)]
pub(super) enum OpenedDisk {
    /// The guest sees the bytes of the file.
    Raw {
        file: DropOffThread<File>,
        path: PathBuf,
        read_only: bool,
    },
    /// An image whose writes go to the snapshot.
    Image { image: Arc<DiskImage>, read_only: bool },
}

impl OpenedDisk {
    /// Its path in messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Raw { path, .. } => path,
            Self::Image { image, .. } => &image.path,
        }
    }

    /// The disk for one boot. With `must_be_read_only`, the guest can only read it.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(super) fn for_machine(&self, must_be_read_only: bool) -> io::Result<BootDisk> {
        Ok(match self {
            Self::Raw { file, path, read_only } => BootDisk::Plain(PlainDisk::File(DiskFile {
                file: file.try_clone()?.into(),
                path: path.clone(),
                read_only: *read_only || must_be_read_only,
            })),
            Self::Image { image, read_only } => BootDisk::CopyOnWrite {
                image: image.clone(),
                read_only: *read_only || must_be_read_only,
            },
        })
    }
}

/// Opens a disk that is not in the image at `root`. Blocks on the file system of its volume.
///
/// # Errors
///
/// The volume has no disk, or the user may not open it, or another machine writes it.
pub(super) fn open(disk: &VmDisk, root: &ImageRoot, user: &FileUser) -> Result<OpenedDisk, VmError> {
    match &disk.source {
        DiskSource::BlockDevice { major, minor } => open_block_device(disk, *major, *minor),
        DiskSource::Volume {
            path,
            content,
            is_read_only,
        } => {
            let read_only = disk.read_only || *is_read_only;
            let shown = Path::new("/disks").join(disk.name.as_str());
            let volume = open_volume(path).map_err(disk_error(&shown, "open the volume"))?;
            match (*content, find_content(&volume, path)?) {
                (DiskContent::Detected, Found::RawFile(file)) => open_raw(disk, file, read_only, user),
                (DiskContent::Blank { size }, Found::RawFile(file)) => open_blank(disk, file, read_only, size, user),
                (DiskContent::Ephemeral, Found::RawFile(file)) => open_ephemeral(disk, &file, root, user),
                (DiskContent::Detected, Found::Keys) => make_disk_of_keys(disk, &volume, path, user),
                (DiskContent::Ephemeral | DiskContent::Blank { .. }, Found::Keys) => Err(VmError::Volume {
                    name: disk.name.as_str().to_owned(),
                    reason: "a Secret or ConfigMap is always a read-only disk: it cannot be ephemeral or blank"
                        .to_owned(),
                }),
                (DiskContent::Detected | DiskContent::Ephemeral, Found::Other) => open_image(disk, &volume, root, user),
                (DiskContent::Blank { size }, Found::Other) => {
                    create_blank(disk, &volume, user)?;
                    open_blank(disk, RawFile::in_volume(&volume, path), read_only, size, user)
                }
            }
        }
    }
}

/// The content of a volume, determined without opening a file in it.
#[derive(Debug)]
enum Found<'a> {
    /// A file whose bytes are those of a disk.
    RawFile(RawFile<'a>),
    /// The keys of a Secret, ConfigMap or similar volume.
    Keys,
    /// An image, or nothing.
    Other,
}

/// The file of a raw disk.
#[derive(Debug)]
struct RawFile<'a> {
    /// The volume with the file. `None` if the volume is the file itself.
    volume: Option<&'a OwnedFd>,
    path: PathBuf,
}

impl<'a> RawFile<'a> {
    fn in_volume(volume: &'a OwnedFd, path: &Path) -> Self {
        Self {
            volume: Some(volume),
            path: path.join(OsStr::from_bytes(RAW_DISK.to_bytes())),
        }
    }

    /// Opens and locks the file with the permissions of `user`. `kind` must be shared if the file is not written.
    fn open(&self, disk: &VmDisk, kind: Lock, user: &FileUser) -> Result<File, VmError> {
        let access = match kind {
            Lock::Shared => OFlags::RDONLY,
            Lock::Exclusive => OFlags::RDWR,
        };
        let file = as_user(user, || {
            let opened = match self.volume {
                Some(volume) => open_regular(volume, RAW_DISK, WITHIN_ROOT, access),
                None => open_regular(CWD, &self.path, ResolveFlags::empty(), access),
            };
            opened.map_err(|error| cannot_open(disk, &self.path, user, error))
        })?;
        lock_disk(disk, &file, &self.path, kind)?;
        Ok(file)
    }
}

/// Determines the content of the volume at `path`. It is a raw disk if it is a file, or contains `disk.img`. Otherwise
/// it has keys if it contains the kubelet's link to their current version, which an image volume does not contain.
fn find_content<'a>(volume: &'a OwnedFd, path: &Path) -> Result<Found<'a>, VmError> {
    let status = fstat(volume).map_err(disk_error(path, "read its type"))?;
    if FileType::from_raw_mode(status.st_mode) == FileType::RegularFile {
        return Ok(Found::RawFile(RawFile {
            volume: None,
            path: path.to_owned(),
        }));
    }
    let kind = |name: &CStr| match rustix::fs::statat(volume, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => Ok(Some(FileType::from_raw_mode(status.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(disk_error(path, "look for disk.img and ..data")(error)),
    };
    Ok(match (kind(RAW_DISK)?, kind(CURRENT_VERSION)?) {
        // A key may have the name disk.img. The kubelet makes each key a symbolic link.
        (None | Some(FileType::Symlink), Some(FileType::Symlink)) => Found::Keys,
        (Some(_), _) => Found::RawFile(RawFile::in_volume(volume, path)),
        (None, _) => Found::Other,
    })
}

/// A read-only disk with the keys in the volume at `path` as files.
fn make_disk_of_keys(disk: &VmDisk, volume: &OwnedFd, path: &Path, user: &FileUser) -> Result<OpenedDisk, VmError> {
    let name = disk.name.as_str();
    let make = || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened =
            rustix::fs::openat(volume, ".", flags, Mode::empty()).map_err(disk_error(path, "open the directory"))?;
        seed::make_disk_of_files(path, opened.as_fd(), name).map_err(|error| VmError::Volume {
            name: name.to_owned(),
            reason: error.to_string(),
        })
    };
    Ok(OpenedDisk::Raw {
        file: as_user(user, make)?.into(),
        path: path.to_owned(),
        read_only: true,
    })
}

/// Locks a disk in a volume. Machines that only read it can share it; a machine that writes it cannot.
fn lock_disk(disk: &VmDisk, file: &File, path: &Path, kind: Lock) -> Result<(), VmError> {
    let path = path.display();
    lock(file, kind).map_err(|errno| VmError::Volume {
        name: disk.name.as_str().to_owned(),
        reason: match (errno, kind) {
            (Errno::AGAIN | Errno::ACCESS, Lock::Shared) => {
                format!("{path} is locked: another virtual machine writes it")
            }
            (Errno::AGAIN | Errno::ACCESS, Lock::Exclusive) => {
                format!("{path} is locked: another virtual machine uses it")
            }
            _ => format!("cannot lock {path}: {}", io::Error::from(errno)),
        },
    })
}

/// Opens a volume without opening a device node or waiting for a fifo.
fn open_volume(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Opens the image in a volume without a raw disk: the only file in `/disk`, or the only file in its root. The writes
/// of the guest end with the container.
fn open_image(disk: &VmDisk, volume: &OwnedFd, root: &ImageRoot, user: &FileUser) -> Result<OpenedDisk, VmError> {
    let shown = Path::new("/disks").join(disk.name.as_str());
    let find = || match open_base(volume.as_fd(), &shown)? {
        Some(found) => Ok(found),
        None => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::openat(volume, ".", flags, Mode::empty())
                .map_err(disk_error(&shown, "open the directory"))?;
            open_only_file(directory.as_fd(), &shown).map_err(|error| match error {
                VmError::Image { path, reason } if path == shown => VmError::Volume {
                    name: disk.name.as_str().to_owned(),
                    reason: format!(
                        "no disk.img is in the volume, and {reason}. If it is an image volume, containerd must support \
                         them (2.1 or later), and the host's mounts must be shared (mount --make-rshared /, as systemd \
                         does)"
                    ),
                },
                error => error,
            })
        }
    };
    let (path, base) = as_user(user, find)?;
    lock_disk(disk, &base, &path, Lock::Shared)?;
    open_copy_on_write(disk, path, base, BaseFormat::Detected, root)
}

/// Opens a raw disk that is not written: the writes of the guest end with the container. A guest may have written it
/// earlier, so its header does not decide its format.
fn open_ephemeral(disk: &VmDisk, file: &RawFile<'_>, root: &ImageRoot, user: &FileUser) -> Result<OpenedDisk, VmError> {
    let base = file.open(disk, Lock::Shared, user)?;
    open_copy_on_write(disk, file.path.clone(), base, BaseFormat::Raw, root)
}

fn open_copy_on_write(
    disk: &VmDisk,
    path: PathBuf,
    base: File,
    format: BaseFormat,
    root: &ImageRoot,
) -> Result<OpenedDisk, VmError> {
    let image = root.with_writes(path, base, format, &format!("{WRITES}-{}", disk.name.as_str()))?;
    Ok(OpenedDisk::Image {
        image: Arc::new(image),
        read_only: disk.read_only,
    })
}

fn open_raw(disk: &VmDisk, file: RawFile<'_>, read_only: bool, user: &FileUser) -> Result<OpenedDisk, VmError> {
    let kind = match read_only {
        true => Lock::Shared,
        false => Lock::Exclusive,
    };
    Ok(OpenedDisk::Raw {
        file: file.open(disk, kind, user)?.into(),
        path: file.path,
        read_only,
    })
}

fn cannot_open(disk: &VmDisk, path: &Path, user: &FileUser, error: OpenError) -> VmError {
    let reason = match error {
        OpenError::NotRegular(kind) => format!("{} is {kind}, not a regular file", path.display()),
        OpenError::System(Errno::ACCESS | Errno::PERM) => format!(
            "{} cannot be opened by the user {} and group {} of the container: change its owner, or set runAsUser or \
             fsGroup",
            path.display(),
            user.uid,
            user.gid
        ),
        error @ OpenError::System(_) => format!("cannot open {}: {error}", path.display()),
    };
    VmError::Volume {
        name: disk.name.as_str().to_owned(),
        reason,
    }
}

/// Creates an empty `disk.img` unless it exists. [`open_blank`] sets its size.
fn create_blank(disk: &VmDisk, volume: &OwnedFd, user: &FileUser) -> Result<(), VmError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shown = Path::new("/disks").join(disk.name.as_str()).join("disk.img");
    let mode = Mode::RUSR | Mode::WUSR;
    as_user(user, || {
        match rustix::fs::openat2(volume, RAW_DISK, flags, mode, WITHIN_ROOT) {
            Ok(_) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(cannot_open(disk, &shown, user, error.into())),
        }
    })
}

/// Opens a raw disk, and makes it sparse with `size` bytes if it is empty: it is new, or an earlier shim ended before
/// it had set the size.
fn open_blank(
    disk: &VmDisk,
    file: RawFile<'_>,
    read_only: bool,
    size: u64,
    user: &FileUser,
) -> Result<OpenedDisk, VmError> {
    let opened = open_raw(disk, file, read_only, user)?;
    if let OpenedDisk::Raw {
        file,
        path,
        read_only: false,
    } = &opened
    {
        // The lock that the file has by now keeps other machines away.
        let status = fstat(&**file).map_err(disk_error(path, "read its size"))?;
        if status.st_size == 0 {
            rustix::fs::ftruncate(&**file, size).map_err(disk_error(path, "set its size"))?;
        }
    }
    Ok(opened)
}

/// Opens a block device at the path in `/dev` that the host's kernel reports for it.
fn open_block_device(disk: &VmDisk, major: u32, minor: u32) -> Result<OpenedDisk, VmError> {
    let invalid = |reason: String| VmError::Volume {
        name: disk.name.as_str().to_owned(),
        reason: format!("block device {major}:{minor}: {reason}"),
    };
    let about = format!("/sys/dev/block/{major}:{minor}/uevent");
    let mut text = String::new();
    File::open(&about)
        .and_then(|file| file.take(4096).read_to_string(&mut text))
        .map_err(|error| invalid(format!("cannot read {about}: {error}")))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| invalid(format!("{about} has no DEVNAME")))?;
    let path = Path::new("/dev").join(name);
    let access = match disk.read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    // O_EXCL on a block device fails if a file system of the host uses it (open(2)).
    let flags = access | OFlags::EXCL | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, &path, flags, Mode::empty())
        .map_err(|error| invalid(format!("cannot open {}: {}", path.display(), io::Error::from(error))))?;
    let status = fstat(&file).map_err(disk_error(&path, "read its type"))?;
    let numbers = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    if FileType::from_raw_mode(status.st_mode) != FileType::BlockDevice || numbers != (major, minor) {
        return Err(invalid(format!("{} is not this block device", path.display())));
    }
    Ok(OpenedDisk::Raw {
        file: File::from(file).into(),
        path,
        read_only: disk.read_only,
    })
}

/// Runs `open` with the permissions of a user: on a new thread with the user's file system ids.
pub(super) fn as_user<T: Send>(
    user: &FileUser,
    open: impl FnOnce() -> Result<T, VmError> + Send,
) -> Result<T, VmError> {
    if *user == FileUser::default() {
        return open();
    }
    let failed = |source| VmError::User {
        uid: user.uid,
        gid: user.gid,
        source,
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("open as user".to_owned())
            .spawn_scoped(scope, || {
                set_file_system_ids(user).map_err(|errno| failed(errno.into()))?;
                open()
            });
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(error) => Err(failed(error)),
        }
    })
}

/// Changes the groups and the file system ids of the calling thread. The kernel takes the capabilities for files from a
/// thread whose file system user is no longer root (capabilities(7)).
fn set_file_system_ids(user: &FileUser) -> Result<(), Errno> {
    let groups = user.additional_gids.iter().copied().map(rustix::process::Gid::from_raw);
    rustix::thread::set_thread_groups(&groups.collect::<Vec<_>>())?;
    let check = |set: libc::c_int, wanted: u32| match u32::try_from(set) {
        Ok(set) if set == wanted => Ok(()),
        _ => Err(Errno::PERM),
    };
    // SAFETY: both functions take a number and change only the calling thread. They return the previous id, so the
    // second call of each shows whether the first had an effect (setfsuid(2)).
    unsafe {
        libc::setfsgid(user.gid);
        check(libc::setfsgid(u32::MAX), user.gid)?;
        libc::setfsuid(user.uid);
        check(libc::setfsuid(u32::MAX), user.uid)
    }
}
