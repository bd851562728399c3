//! The system calls of the process that inspects an image.

use crate::jail::seccomp::{
    Call, CallList, allowed,
    runtime::{EVERY_THREAD, REFUSED_WITHOUT_FILES},
};

const CALLS: &[Call] = &[
    allowed!(SYS_pread64, "the image"),
    allowed!(SYS_lseek, "the size of a block device"),
    allowed!(SYS_statx, "the size of the image"),
];

/// The process, which has one thread.
pub(crate) const PROCESS: CallList = CallList {
    thread: "main",
    own: &[EVERY_THREAD, CALLS],
    starts: &[],
    refused: REFUSED_WITHOUT_FILES,
};
