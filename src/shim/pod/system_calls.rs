//! The system calls of a pid holder.

use crate::jail::seccomp::{Call, CallList, allowed};

const CALLS: &[Call] = &[
    allowed!(SYS_write, "the report that it is ready"),
    allowed!(SYS_close_range, "the shim's descriptors, of which it has copies"),
    allowed!(SYS_ppoll, "its sleep"),
];

/// The list of a holder, which has one thread. It applies from the moment that the holder has joined its namespace.
pub(crate) const HOLDER: CallList = CallList {
    thread: "main",
    own: &[CALLS],
    starts: &[],
    refused: &[],
};
