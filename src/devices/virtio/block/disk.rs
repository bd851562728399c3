//! A disk of the host: its backing, capacity and serial.

use std::{fs::File, io, sync::Arc};

use nutshell_disk_image::{DISCARD_ALIGNMENT, Image, io::file_size};

use crate::devices::counters::Counters;

/// The unit of positions and capacities, in bytes. It does not depend on the block size (virtio 1.3 §5.2).
pub(super) const SECTOR_SIZE: u64 = nutshell_disk_image::SECTOR_SIZE;

/// The backing of a disk: the file or image with its bytes.
#[derive(Debug)]
pub(crate) enum Backing {
    /// A file or block device of the host, byte for byte.
    File { file: File, read_only: bool },
    /// A base image, which is never written. Writes go to the copy-on-write file if there is one.
    Image(Box<Image>),
}

impl Backing {
    pub(super) fn is_read_only(&self) -> bool {
        match self {
            Self::File { read_only, .. } => *read_only,
            Self::Image(image) => image.is_read_only(),
        }
    }

    /// The alignment of discards that free the most space, in sectors.
    pub(super) fn discard_alignment(&self) -> u32 {
        match self {
            Self::File { .. } => 1,
            Self::Image(_) => DISCARD_ALIGNMENT,
        }
    }

    /// In bytes.
    fn size(&self) -> io::Result<u64> {
        match self {
            Self::File { file, .. } => file_size(file)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot get the size of the file: {error}"))),
            Self::Image(image) => Ok(image.size()),
        }
    }
}

/// A disk, which the worker threads of its device share.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) backing: Backing,
    /// In sectors.
    pub(super) capacity: u64,
    /// Their name is the serial.
    pub(super) counters: Arc<Counters>,
}

impl Disk {
    pub(super) fn new(backing: Backing, counters: Arc<Counters>) -> io::Result<Self> {
        Ok(Self {
            capacity: backing.size()? / SECTOR_SIZE,
            backing,
            counters,
        })
    }

    pub(super) fn serial(&self) -> &str {
        self.counters.name()
    }
}
