//! The daemon.

use std::process::ExitCode;

use super::ServeContext;

/// Serves until the last container is gone.
pub(crate) fn run(_context: ServeContext) -> ExitCode {
    ExitCode::FAILURE
}
