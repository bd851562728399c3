//! The failures of opening standard streams.

use std::{io, path::PathBuf};

use super::{endpoint::EndpointError, logger::LoggerError, streaming::StreamingError};

/// Why the standard streams of a process cannot be opened. `stream` is `stdin`, `stdout` or `stderr`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The fifo or file cannot be opened.
    #[error("cannot open {stream} {}: {source}", path.display())]
    Open {
        stream: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// No client has opened the stream.
    #[error("cannot open {stream} with streaming_id {id}: {source}")]
    Streaming {
        stream: &'static str,
        id: String,
        source: StreamingError,
    },
}
