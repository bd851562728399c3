//! Partitions of block devices.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// `BLKPG`, the request that changes the partitions of a block device, and its operation that adds one
/// (kernel, `include/uapi/linux/blkpg.h`).
const BLKPG: u32 = 0x1269;
const BLKPG_ADD_PARTITION: i32 = 1;

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: i32,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Arguments {
    operation: i32,
    flags: i32,
    size: i32,
    partition: *mut Partition,
}

/// Makes `length` bytes from `start` on the partition `number` of `disk`. Both are multiples of 512. The disk is not
/// changed: only the kernel knows the partition.
pub(crate) fn add_partition(disk: impl AsFd, number: i32, start: u64, length: u64) -> io::Result<()> {
    let in_range = |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let mut partition = Partition {
        start: in_range(start)?,
        length: in_range(length)?,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let arguments = Arguments {
        operation: BLKPG_ADD_PARTITION,
        flags: 0,
        size: i32::try_from(size_of::<Partition>()).unwrap_or_default(),
        partition: &raw mut partition,
    };
    // SAFETY: BLKPG reads the arguments and the partition that they point to, and both outlive the call.
    check(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), libc::Ioctl::from(BLKPG), &raw const arguments) }).map(drop)
}
