//! Why a command of the guest agent failed.

use std::{io, time::Duration};

/// The numbers are limits in bytes. Text of the guest is in one line, clipped, and without control characters.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestAgentError {
    #[error("the QEMU guest agent does not answer {command} within {limit:?}")]
    Silent { command: &'static str, limit: Duration },
    #[error("the port of the QEMU guest agent is closed")]
    Closed,
    #[error("cannot use the port of the QEMU guest agent: {0}")]
    Socket(#[from] io::Error),
    #[error(
        "the QEMU guest agent sent an answer of more than {} MiB: redirect the output of the process to a file",
        .0 >> 20
    )]
    LineTooLong(usize),
    #[error("the QEMU guest agent sent {} MiB, but no answer to guest-sync-delimited", .0 >> 20)]
    NotSynchronized(usize),
    #[error("cannot parse the answer of the QEMU guest agent to {command}: {reason}")]
    Malformed { command: &'static str, reason: String },
    #[error("the QEMU guest agent refuses {command}: {reason}")]
    Refused { command: &'static str, reason: String },
}
