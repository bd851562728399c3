//! A disk of the host: its file or block device, capacity and serial.

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use crate::devices::counters::Counters;

/// The unit of positions and capacities, in bytes. It does not depend on the block size (virtio 1.3 §5.2).
pub(super) const SECTOR_SIZE: u64 = 512;

/// The file or block device behind a disk.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) file: File,
    pub(crate) read_only: bool,
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
            capacity: size_in_bytes(&backing.file)? / SECTOR_SIZE,
            backing,
            counters,
        })
    }

    pub(super) fn serial(&self) -> &str {
        self.counters.name()
    }
}

fn size_in_bytes(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::FileTypeExt;

    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    // Moving the position is harmless, since each request is executed at an explicit offset.
    io::Seek::seek(&mut &*file, io::SeekFrom::End(0)).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot get the size of block device {}: {error}", file.as_raw_fd()),
        )
    })
}
