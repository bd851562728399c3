//! The limits of a disk's size and of accesses to it.

use std::io;

/// The unit of positions and sizes of a disk, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// The maximum size of a disk in bytes, 8 TiB. It limits the memory for the bitmap of a copy-on-write file to 16 MiB,
/// and keeps that file below the maximum of ext4.
pub const MAX_VIRTUAL_SIZE: u64 = 8 << 40;

/// The preferred alignment of a discard, in sectors: a cluster of the copy-on-write file. A discard of a part of a
/// cluster that is not present copies the rest of the cluster from the base image.
pub const DISCARD_ALIGNMENT: u32 = 128;

/// Returns why `size`, in bytes, is not a valid size of a disk. `None` if it is valid.
pub(crate) fn find_size_problem(size: u64) -> Option<&'static str> {
    if size == 0 {
        Some("the disk is empty: the file may be incomplete")
    } else if !size.is_multiple_of(SECTOR_SIZE) {
        Some("not a multiple of 512: the file may be incomplete")
    } else if size > MAX_VIRTUAL_SIZE {
        Some("more than the maximum of 8 TiB")
    } else {
        None
    }
}

/// An error unless the range is inside of a disk of `size` bytes.
pub(crate) fn check_range(size: u64, offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the range lies outside the disk",
        )),
    }
}
