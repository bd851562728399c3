//! A base image: its format, and access to the disk that it contains.

use std::io;

use crate::{
    io::{ReadAt, Target, fill, fill_with_zeroes, read_up_to},
    limits::{check_range, find_size_problem},
    qcow2::{self, Mapping, Qcow2, Qcow2Error},
};

/// Why a base image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The file cannot be read.
    #[error("cannot read {what} of the base image: {source}")]
    Read {
        /// The part of the file.
        what: &'static str,
        /// The error of the host.
        source: io::Error,
    },
    /// The file has the magic number of another format.
    #[error("the format of the base image is {0}, which is not supported: convert it to raw or qcow2")]
    Format(&'static str),
    /// The size of a raw image is not usable.
    #[error("the size of the raw base image is {size} bytes, {problem}")]
    RawSize {
        /// In bytes.
        size: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The qcow2 image is invalid, or needs something that is not supported.
    #[error("qcow2 base image: {0}")]
    Qcow2(#[from] Qcow2Error),
}

/// Returns a function that adds the part of the file that could not be read.
fn read_error(what: &'static str) -> impl Fn(io::Error) -> BaseError {
    move |source| BaseError::Read { what, source }
}

/// How the file of a base image stores the bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Formats that are recognized so that they are not taken for raw disks. A boot sector cannot start with these bytes.
const OTHER_FORMATS: [(&[u8], &str); 8] = [
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
];

impl BaseFormat {
    /// Detects the format by the magic number at the start. A file without a known magic number is raw.
    ///
    /// The result depends on bytes that a guest can write, if it can write the disk. A guest that writes a qcow2 header
    /// to a raw disk must not change the disk's format: use this only for a file that no guest can write.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or has another format that is known.
    pub fn detect(file: &dyn ReadAt) -> Result<Self, BaseError> {
        let mut start = [0; 8];
        let count = read_up_to(file, &mut start, 0).map_err(read_error("the start"))?;
        let start = &start[..count];
        if start.starts_with(&qcow2::MAGIC) {
            return Ok(Self::Qcow2);
        }
        match OTHER_FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
            Some((_, name)) => Err(BaseError::Format(name)),
            None => Ok(Self::Raw),
        }
    }

    /// `raw` or `qcow2`, as in QEMU and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A read-only base image.
#[derive(Debug)]
pub enum Base {
    /// The file has the bytes of the disk, without a header.
    Raw {
        /// The bytes of the disk.
        file: Box<dyn ReadAt>,
        /// The size of the disk in bytes.
        size: u64,
    },
    /// Tables in the file say where the bytes of the disk are.
    Qcow2(Box<Qcow2>),
}

impl Base {
    /// Opens a base image whose format is detected (see [`BaseFormat::detect`]).
    ///
    /// # Errors
    ///
    /// The image cannot be read, is invalid, or needs something that is not supported.
    pub fn open(file: Box<dyn ReadAt>) -> Result<Self, BaseError> {
        match BaseFormat::detect(&*file)? {
            BaseFormat::Qcow2 => Ok(Self::Qcow2(Box::new(Qcow2::open(file)?))),
            BaseFormat::Raw => Self::open_raw(file),
        }
    }

    /// Opens a base image as raw, and does not detect its format.
    ///
    /// # Errors
    ///
    /// The size of `file` cannot be read, or is not the size of a disk.
    pub fn open_raw(file: Box<dyn ReadAt>) -> Result<Self, BaseError> {
        let size = file.size().map_err(read_error("the size"))?;
        match find_size_problem(size) {
            Some(problem) => Err(BaseError::RawSize { size, problem }),
            None => Ok(Self::Raw { file, size }),
        }
    }

    /// The size of the disk in bytes, a multiple of [`crate::SECTOR_SIZE`].
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(image) => image.size(),
        }
    }

    /// Fills the next `count` bytes of `target` with the bytes of the disk at `offset`.
    ///
    /// # Errors
    ///
    /// The range is not inside of the disk, its bytes cannot be read, or the image is invalid there.
    pub fn read(&self, target: &mut dyn Target, mut offset: u64, mut count: usize) -> io::Result<()> {
        check_range(self.size(), offset, count as u64)?;
        let image = match self {
            Self::Raw { file, .. } => return fill(target, &**file, offset, count),
            Self::Qcow2(image) => image,
        };
        while count > 0 {
            let (mapping, length) = image.map(offset, count as u64)?;
            let part = usize::try_from(length).unwrap_or(usize::MAX).min(count);
            match mapping {
                Mapping::Zero => fill_with_zeroes(target, part),
                Mapping::Data(position) => fill(target, image.file(), position, part)?,
                Mapping::Compressed(cluster) => image.read_compressed(target, cluster, offset, part)?,
            }
            offset += part as u64;
            count -= part;
        }
        Ok(())
    }

    /// Whether the image has no data in this range, which then reads as zeroes. `false` if there may be data.
    ///
    /// # Errors
    ///
    /// The image cannot be read, or is invalid there.
    pub(crate) fn is_unallocated(&self, mut offset: u64, mut length: u64) -> io::Result<bool> {
        let Self::Qcow2(image) = self else {
            return Ok(false);
        };
        while length > 0 {
            match image.map(offset, length)? {
                (Mapping::Zero, part) => {
                    offset += part;
                    length = length.saturating_sub(part);
                }
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// A checksum of the first `count` bytes of the disk. It distinguishes images of the same size, because their
    /// partition tables and file systems have different ids.
    pub(crate) fn checksum_of_start(&self, count: u64) -> io::Result<u64> {
        let count = usize::try_from(self.size().min(count)).unwrap_or(0);
        let mut bytes = vec![0; count];
        self.read(&mut &mut bytes[..], 0, count)?;
        // FNV-1a.
        Ok(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        }))
    }
}
