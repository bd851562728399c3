//! The error type of guest memory.

use std::io;

/// Why memory cannot be mapped or filled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The host refused a mapping or its file.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map { bytes: u64, source: io::Error },
    /// The size is zero or not a multiple of [`super::HUGE_PAGE_SIZE`].
    #[error("the size of guest memory is {0} bytes, but it must be a positive multiple of 2 MiB")]
    Size(u64),
    /// A file cannot be loaded into memory.
    #[error("the guest's {what} cannot be loaded into its memory at {address:#x}: {source}")]
    Load {
        what: &'static str,
        /// Guest physical address.
        address: u64,
        source: io::Error,
    },
}
