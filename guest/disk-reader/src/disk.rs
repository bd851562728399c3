//! Access to the files of a disk. Every other module opens files only through this one.

use std::cell::Cell;
use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::partitions::PartitionType;

/// How many files and directories are opened in total. A disk with dozens of kernels needs a few hundred.
const MAX_OPERATIONS: u32 = 8192;

/// How many bytes of configuration are read in total. A large `grub.cfg` has a few hundred kilobytes.
const MAX_READ: usize = 32 << 20;

/// The largest number of entries of a directory. One with more is not read. `/boot` and the directories of boot loaders
/// have at most some hundred.
const MAX_DIRECTORY_ENTRIES: usize = 4096;

/// How many file systems of a disk are searched. Disks of virtual machines have fewer than ten.
pub(crate) const MAX_FILE_SYSTEMS: usize = 64;

/// How many file systems an error text lists.
const MAX_DESCRIBED: usize = 8;

/// A mounted file system of a disk.
#[derive(Debug)]
pub struct FileSystem {
    /// The name of its device, such as `vda1`, for error texts.
    pub name: String,
    /// The number of its partition; `None` if it is on the disk itself.
    pub number: Option<u32>,
    /// What the partition table declares.
    pub partition_type: PartitionType,
    /// The label of its partition (GPT).
    pub partition_label: Option<String>,
    /// The type, as for mount(2).
    pub kind: String,
    /// The UUID, in the form that blkid(8) prints.
    pub uuid: Option<String>,
    /// What mount(8) accepts as `LABEL=`.
    pub label: Option<String>,
    /// Its root directory. No access leaves the tree below it.
    pub root: OwnedFd,
}

/// The file systems of a disk, and what may still be read from them.
#[derive(Debug)]
pub struct Disk {
    file_systems: Vec<FileSystem>,
    deadline: Instant,
    operations: Cell<u32>,
    bytes: Cell<usize>,
}

/// Why a file or directory could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("does not exist")]
    NotFound,
    #[error("is {0}, not a regular file")]
    NotRegular(&'static str),
    #[error("has {size} bytes, more than the limit of {max}")]
    TooLarge { size: u64, max: u64 },
    #[error("has more than {MAX_DIRECTORY_ENTRIES} entries")]
    TooManyEntries,
    #[error("is a loop of symbolic links, or too long a chain of them")]
    Loop,
    #[error("cannot be read, because the limits of {MAX_OPERATIONS} accesses and {MAX_READ} bytes are reached")]
    Limit,
    #[error("cannot be read in time")]
    Deadline,
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for ReadError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => Self::NotFound,
            Errno::LOOP => Self::Loop,
            errno => Self::Io(errno.into()),
        }
    }
}

/// A file system by its position in the disk's list, and an absolute path in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) file_system: usize,
    pub(crate) path: String,
}

impl Location {
    pub(crate) fn new(file_system: usize, path: impl Into<String>) -> Self {
        Self {
            file_system,
            path: path.into(),
        }
    }

    /// Returns the directory of the path, without a slash at its end.
    pub(crate) fn directory(&self) -> &str {
        self.path.rsplit_once('/').map_or("", |(directory, _)| directory)
    }

    /// Returns the path without its directories.
    pub(crate) fn name(&self) -> &str {
        self.path.rsplit_once('/').map_or(&self.path, |(_, name)| name)
    }
}

impl Disk {
    /// Creates a disk of the first 64 of `file_systems`. Nothing is read from it after `deadline`.
    #[must_use]
    pub fn new(mut file_systems: Vec<FileSystem>, deadline: Instant) -> Self {
        file_systems.truncate(MAX_FILE_SYSTEMS);
        Self {
            file_systems,
            deadline,
            operations: Cell::new(MAX_OPERATIONS),
            bytes: Cell::new(MAX_READ),
        }
    }

    /// Returns the file systems, in the order in which [`crate::BootFile`] counts them.
    #[must_use]
    pub fn file_systems(&self) -> &[FileSystem] {
        &self.file_systems
    }

    /// Returns the positions of the file systems, those of boot loaders first: the EFI system partition, then the
    /// extended boot loader partition, then the others in the order of the disk.
    pub(crate) fn boot_order(&self) -> Vec<usize> {
        let types = [
            PartitionType::EfiSystem,
            PartitionType::ExtendedBootLoader,
            PartitionType::Other,
        ];
        let all = self.file_systems.iter().enumerate();
        let of_type = |kind| all.clone().filter(move |(_, it)| it.partition_type == kind);
        types.into_iter().flat_map(of_type).map(|(at, _)| at).collect()
    }

    /// Returns a description of the file systems for error texts; it is empty if there are none.
    pub(crate) fn describe(&self) -> String {
        let describe = |file_system: &FileSystem| {
            let label = file_system.label.as_ref().or(file_system.partition_label.as_ref());
            let label = label.map(|label| format!(" {label:?}")).unwrap_or_default();
            format!("{} ({}{label})", file_system.name, file_system.kind)
        };
        let mut texts: Vec<_> = self.file_systems.iter().take(MAX_DESCRIBED).map(describe).collect();
        if self.file_systems.len() > MAX_DESCRIBED {
            texts.push(format!("{} more", self.file_systems.len() - MAX_DESCRIBED));
        }
        texts.join(", ")
    }

    /// Returns the text for a location in error texts.
    pub(crate) fn describe_location(&self, location: &Location) -> String {
        let name = self.file_systems.get(location.file_system).map_or("?", |it| &it.name);
        format!("{} on {name}", location.path)
    }

    /// Opens a regular file of at most `max` bytes, and returns it with its size. Follows symbolic links, which cannot
    /// lead out of the file system.
    pub(crate) fn open(&self, location: &Location, max: u64) -> Result<(File, u64), ReadError> {
        // O_PATH has no side effects. Opening a device or a FIFO for reading may block or trigger an action.
        let probe = self.open_at(location, OFlags::PATH)?;
        check_regular(&probe)?;
        let file = self.open_at(location, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let size = check_regular(&file)?;
        if size > max {
            return Err(ReadError::TooLarge { size, max });
        }
        Ok((File::from(file), size))
    }

    /// Reads a regular file of at most `max` bytes.
    pub(crate) fn read(&self, location: &Location, max: usize) -> Result<Vec<u8>, ReadError> {
        let (file, size) = self.open(location, max as u64)?;
        self.read_part(&file, usize::try_from(size).unwrap_or(max).min(max))
    }

    /// Reads at most `max` bytes from the position of `file`.
    pub(crate) fn read_part(&self, file: &File, max: usize) -> Result<Vec<u8>, ReadError> {
        let left = self.bytes.get().checked_sub(max).ok_or(ReadError::Limit)?;
        self.bytes.set(left);
        let mut bytes = Vec::new();
        file.take(max as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a text file of at most `max` bytes. Bytes that are not UTF-8 are replaced.
    pub(crate) fn read_text(&self, location: &Location, max: usize) -> Result<String, ReadError> {
        let bytes = self.read(location, max)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether a regular file exists.
    pub(crate) fn is_file(&self, location: &Location) -> bool {
        let probe = self.open_at(location, OFlags::PATH);
        probe.is_ok_and(|probe| check_regular(&probe).is_ok())
    }

    /// Whether a directory exists.
    pub(crate) fn is_directory(&self, location: &Location) -> bool {
        self.open_at(location, OFlags::PATH | OFlags::DIRECTORY).is_ok()
    }

    /// Returns the names in a directory, sorted. Leaves out names that are not UTF-8.
    pub(crate) fn list(&self, location: &Location) -> Result<Vec<String>, ReadError> {
        let directory = self.open_at(location, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for (count, entry) in Dir::read_from(&directory)?.enumerate() {
            if count == MAX_DIRECTORY_ENTRIES {
                return Err(ReadError::TooManyEntries);
            }
            if let Ok(name) = entry?.file_name().to_str()
                && !matches!(name, "." | "..")
            {
                insert_sorted(&mut names, name.to_owned(), String::cmp);
            }
        }
        Ok(names)
    }

    fn open_at(&self, location: &Location, flags: OFlags) -> Result<OwnedFd, ReadError> {
        if Instant::now() >= self.deadline {
            return Err(ReadError::Deadline);
        }
        let left = self.operations.get().checked_sub(1).ok_or(ReadError::Limit)?;
        self.operations.set(left);
        let file_system = self.file_systems.get(location.file_system).ok_or(ReadError::NotFound)?;
        let path = location.path.trim_start_matches('/');
        let path = if path.is_empty() { "." } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        // A path with a NUL byte is refused here.
        let opened = rustix::fs::openat2(&file_system.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        Ok(opened?)
    }
}

/// Inserts `item` into sorted `items`, after those that are less or equal. The agent does not sort, because the machine
/// code of a sort is ten times as large.
pub(crate) fn insert_sorted<T>(items: &mut Vec<T>, item: T, compare: impl Fn(&T, &T) -> Ordering) {
    let at = items.partition_point(|other| compare(other, &item).is_le());
    items.insert(at, item);
}

/// Returns the size of a regular file.
fn check_regular(file: &OwnedFd) -> Result<u64, ReadError> {
    let stat = rustix::fs::fstat(file)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(u64::try_from(stat.st_size).unwrap_or_default()),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "of an unknown type",
    };
    Err(ReadError::NotRegular(kind))
}
