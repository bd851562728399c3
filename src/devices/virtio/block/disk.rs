//! A disk of the host: its backing, capacity and serial.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nutshell_disk_image::{DISCARD_ALIGNMENT, Image, io::file_size};
use rustix::fs::{SealFlags, fcntl_get_seals};

use super::joined::JoinedFiles;
use crate::devices::counters::Counters;

/// The unit of positions and capacities, in bytes. It does not depend on the block size (virtio 1.3 §5.2).
pub(super) const SECTOR_SIZE: u64 = nutshell_disk_image::SECTOR_SIZE;

/// The backing of a disk: the file or image with its bytes.
#[derive(Debug)]
pub(crate) enum Backing {
    /// A file or block device of the host, byte for byte.
    File { file: File, read_only: bool },
    /// Several files of the host, one after the other.
    Joined(JoinedFiles),
    /// A base image, which is never written. Writes go to the copy-on-write file if there is one.
    Image(Box<Image>),
}

impl Backing {
    pub(crate) fn is_read_only(&self) -> bool {
        match self {
            Self::File { read_only, .. } => *read_only,
            Self::Joined(files) => files.is_read_only(),
            Self::Image(image) => image.is_read_only(),
        }
    }

    /// The alignment of discards that free the most space, in sectors.
    pub(super) fn discard_alignment(&self) -> u32 {
        match self {
            Self::File { .. } | Self::Joined(_) => 1,
            Self::Image(_) => DISCARD_ALIGNMENT,
        }
    }

    /// Whether the size can change. The sizes of images, joined files and sealed memfds cannot.
    pub(super) fn can_grow(&self) -> bool {
        match self {
            Self::File { file, .. } => !fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::GROW)),
            Self::Joined(_) | Self::Image(_) => false,
        }
    }

    /// The size in bytes. Can block on the file system of the host.
    pub(crate) fn size(&self) -> io::Result<u64> {
        match self {
            Self::File { file, .. } => file_size(file)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot get the size of the file: {error}"))),
            Self::Joined(files) => Ok(files.size()),
            Self::Image(image) => Ok(image.size()),
        }
    }
}

/// A disk, which the worker threads of its device share.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) backing: Backing,
    pub(super) capacity: Capacity,
    /// The counters, which have the name of the disk's serial.
    pub(super) counters: Arc<Counters>,
}

impl Disk {
    pub(super) fn new(backing: Backing, counters: Arc<Counters>) -> io::Result<Self> {
        Ok(Self {
            capacity: Capacity::new(backing.size()? / SECTOR_SIZE),
            backing,
            counters,
        })
    }

    pub(super) fn serial(&self) -> &str {
        self.counters.name()
    }
}

/// The capacity of a disk, and the number of times that it has grown. A driver reads the capacity in parts, and
/// compares the generation before and after: both must change at the same time, so they are one number.
#[derive(Debug)]
pub(super) struct Capacity(AtomicU64);

impl Capacity {
    /// The bits of the capacity. A file has at most 2^63 bytes. The PCI transport has 8 bits for the generation, which
    /// may repeat after 256 changes.
    const BITS: u32 = 56;

    pub(super) fn new(sectors: u64) -> Self {
        Self(AtomicU64::new(sectors.min(Self::max())))
    }

    /// The current capacity, which only grows.
    pub(super) fn sectors(&self) -> u64 {
        self.0.load(Ordering::SeqCst) & Self::max()
    }

    pub(super) fn generation(&self) -> u32 {
        u32::try_from(self.0.load(Ordering::SeqCst) >> Self::BITS).unwrap_or(0)
    }

    /// Sets the capacity and changes the generation. Only one thread may call this.
    pub(super) fn grow(&self, sectors: u64) {
        let next = u64::from(self.generation()) + 1;
        self.0
            .store(next << Self::BITS | sectors.min(Self::max()), Ordering::SeqCst);
    }

    const fn max() -> u64 {
        (1 << Self::BITS) - 1
    }
}
