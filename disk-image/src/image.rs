//! A disk: a base image, and optionally a copy-on-write file.

use std::io;

use crate::{
    base::{Base, BaseError},
    cow::{CowError, CowFile},
    io::{ReadAt, Source, Storage, Target},
};

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The base image is refused.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The copy-on-write file is refused.
    #[error("copy-on-write file: {0}")]
    Cow(#[from] CowError),
}

/// The disk of a guest. Several threads may use it at the same time; accesses to the same bytes at the same time have
/// no defined order.
#[derive(Debug)]
pub struct Image {
    base: Base,
    cow: Option<CowFile>,
    read_only: bool,
}

impl Image {
    /// Opens a disk that cannot be written. See [`crate::BaseFormat::detect`] for what `base` must be.
    ///
    /// # Errors
    ///
    /// The base image cannot be read, is invalid, or needs something that is not supported.
    pub fn open_read_only(base: Box<dyn ReadAt>) -> Result<Self, ImageError> {
        Ok(Self {
            base: Base::open(base)?,
            cow: None,
            read_only: true,
        })
    }

    /// Opens a disk whose writes go to `cow`: an empty file, or one that was used with the same base image before.
    ///
    /// `host_boot` is the boot ID of the host (`/proc/sys/kernel/random/boot_id`). If it differs from that of the last
    /// use, the host may have lost writes that were not flushed. The disk then has the state of the last flush, but
    /// later writes to clusters that were present at that flush may be there in part or in full.
    ///
    /// # Errors
    ///
    /// The errors of [`Image::open_read_only`], or the copy-on-write file cannot be used or belongs to another base
    /// image.
    pub fn open(base: Box<dyn ReadAt>, cow: Box<dyn Storage>, host_boot: [u8; 16]) -> Result<Self, ImageError> {
        Self::with_base(Base::open(base)?, cow, host_boot)
    }

    /// Like [`Image::open`], but reads the base image as a raw image and does not detect its format. Use this if a
    /// guest may have written to the base image: it could have written the header of another format.
    ///
    /// # Errors
    ///
    /// The errors of [`Image::open`].
    pub fn open_raw(base: Box<dyn ReadAt>, cow: Box<dyn Storage>, host_boot: [u8; 16]) -> Result<Self, ImageError> {
        Self::with_base(Base::open_raw(base)?, cow, host_boot)
    }

    fn with_base(base: Base, cow: Box<dyn Storage>, host_boot: [u8; 16]) -> Result<Self, ImageError> {
        let cow = CowFile::open(cow, &base, host_boot)?;
        Ok(Self {
            base,
            cow: Some(cow),
            read_only: false,
        })
    }

    /// Makes the disk read-only. It keeps its earlier writes.
    #[must_use]
    pub fn into_read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    /// The size of the disk in bytes, a multiple of [`crate::SECTOR_SIZE`].
    pub fn size(&self) -> u64 {
        self.base.size()
    }

    /// Whether the disk has no copy-on-write file, or [`Self::into_read_only`] was called.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fills all of `target` with the bytes of the disk at `offset`.
    ///
    /// # Errors
    ///
    /// The range is not inside of the disk, its bytes cannot be read, or the base image is invalid there.
    pub fn read(&self, target: &mut dyn Target, offset: u64) -> io::Result<()> {
        let count = target.remaining();
        match &self.cow {
            Some(cow) => cow.read(&self.base, target, offset, count),
            None => self.base.read(target, offset, count),
        }
    }

    /// Writes all of `source` to the disk at `offset`.
    ///
    /// # Errors
    ///
    /// The disk is read-only, the range is not inside of it, or the host failed. Any part of `source` may have been
    /// written then, and no other bytes have changed.
    pub fn write(&self, source: &mut dyn Source, offset: u64) -> io::Result<()> {
        self.writable()?.write(&self.base, source, offset)
    }

    /// Makes a range of the disk read as zeroes. With `unmap`, the host may free its blocks.
    ///
    /// # Errors
    ///
    /// The errors of [`Image::write`].
    pub fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.writable()?.zero(&self.base, offset, length, unmap)
    }

    /// Returns when all earlier writes are on stable storage.
    ///
    /// # Errors
    ///
    /// The host failed; writes may be lost. After a sync of the host has failed, all later calls fail.
    pub fn flush(&self) -> io::Result<()> {
        self.cow.as_ref().map_or(Ok(()), CowFile::flush)
    }

    fn writable(&self) -> io::Result<&CowFile> {
        self.cow
            .as_ref()
            .filter(|_| !self.read_only)
            .ok_or_else(|| io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only"))
    }
}
