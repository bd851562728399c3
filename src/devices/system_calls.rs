//! The system calls of the threads of devices, and those that the activation of a device makes in a vCPU's thread. The
//! lists of the threads that start these threads must have their calls too ([`crate::jail::seccomp`]).

use crate::jail::seccomp::{
    Call, CallList, allowed,
    runtime::{EVERY_THREAD, REFUSED_WITHOUT_FILES, WAIT_FOR_EVENTS},
};

/// Offloads and queues of a tap device.
const TAP_IOCTLS: [u32; 2] = [lower_half(libc::TUNSETOFFLOAD), lower_half(libc::TUNSETQUEUE)];

/// The kernel reads the lower 32 bits of an ioctl's number.
const fn lower_half(number: libc::c_ulong) -> u32 {
    (number & 0xffff_ffff) as u32
}

/// What the activation, the reset and the configuration of a device need, besides the start of threads.
pub(crate) const ACTIVATION: &[Call] = &[
    allowed!(SYS_eventfd2, "the event that stops the thread of a queue"),
    allowed!(SYS_ioctl[1] in TAP_IOCTLS, "offloads and queues of a tap device"),
    allowed!(
        SYS_sendmsg,
        "vhost-user: the file server's queues; warnings for the shim"
    ),
    allowed!(SYS_ppoll, "vhost-user: the wait for an answer of the file server"),
    allowed!(SYS_recvmsg, "vhost-user: the answers of the file server"),
    allowed!(SYS_timerfd_settime, "the timer that finds stalled queues"),
];

const BLOCK_CALLS: &[Call] = &[
    allowed!(SYS_preadv, "reads"),
    allowed!(SYS_pwritev, "writes"),
    allowed!(SYS_pread64, "reads of an image's tables and clusters"),
    allowed!(SYS_pwrite64, "writes to a copy-on-write file and its bitmaps"),
    allowed!(
        SYS_fallocate,
        "discards, writes of zeroes, space for a copy-on-write file"
    ),
    allowed!(SYS_fdatasync, "flushes"),
    allowed!(SYS_sendmsg, "warnings for the shim"),
    allowed!(SYS_timerfd_settime, "the timer that finds stalled queues"),
];

/// The thread of a disk's queue.
pub(crate) const BLOCK: CallList = CallList {
    thread: "block",
    own: &[EVERY_THREAD, BLOCK_CALLS],
    starts: &[],
    refused: REFUSED_WITHOUT_FILES,
};

const NET_CALLS: &[Call] = &[
    allowed!(SYS_readv, "packets for the guest"),
    allowed!(SYS_writev, "packets of the guest"),
    allowed!(SYS_ioctl[1] in TAP_IOCTLS, "offloads and queues of a tap device, by the control queue"),
    allowed!(SYS_sendmsg, "warnings for the shim"),
    allowed!(SYS_timerfd_settime, "the timer that finds stalled queues"),
];

/// The thread of a queue pair of a network device.
pub(crate) const NET: CallList = CallList {
    thread: "net",
    own: &[EVERY_THREAD, WAIT_FOR_EVENTS, NET_CALLS],
    starts: &[],
    refused: REFUSED_WITHOUT_FILES,
};

const DISK_SIZES_CALLS: &[Call] = &[
    allowed!(SYS_statx, "the size of a file"),
    allowed!(SYS_lseek, "the size of a block device"),
    allowed!(SYS_sendmsg, "warnings for the shim"),
];

/// The thread that finds out that disks have grown.
pub(crate) const DISK_SIZES: CallList = CallList {
    thread: "disk sizes",
    own: &[EVERY_THREAD, DISK_SIZES_CALLS],
    starts: &[],
    refused: REFUSED_WITHOUT_FILES,
};
