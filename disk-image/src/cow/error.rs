//! Why a copy-on-write file is refused.

use std::io;

/// Why a copy-on-write file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// A system call on the file failed.
    #[error("cannot {step}: {source}")]
    Host {
        /// What failed.
        step: &'static str,
        /// What the system call returned.
        source: io::Error,
    },
    /// The base image cannot be read.
    #[error("cannot read the base image: {0}")]
    Base(#[source] io::Error),
    /// The file is neither empty nor a copy-on-write file for a disk of this size.
    #[error(
        "its size is {size} bytes instead of {expected}: it belongs to another base image or is incomplete, remove it \
         to start again from the base image"
    )]
    Size {
        /// In bytes.
        size: u64,
        /// The size for a disk of the base image's size, in bytes.
        expected: u64,
    },
    /// The header block does not start with the magic number.
    #[error("its header starts with \"{}\" instead of \"NUTSHCOW\": it is no copy-on-write file, remove it to start again from the base image", .0.escape_ascii())]
    Magic([u8; 8]),
    /// A field of the header differs.
    #[error(
        "{field} is {value} instead of {expected}: it belongs to another base image or version, remove it to start \
         again from the base image"
    )]
    Field {
        /// For the text: "version" or "disk size", for example.
        field: &'static str,
        /// What the header has.
        value: u64,
        /// The value for this base image.
        expected: u64,
    },
}

/// Returns a function that adds the failed `step`, in the infinitive, to an error of the host.
pub(super) fn host_error(step: &'static str) -> impl Fn(io::Error) -> CowError {
    move |source| CowError::Host { step, source }
}
