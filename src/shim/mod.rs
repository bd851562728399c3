//! containerd's side.

use std::process::ExitCode;

/// Runs the shim.
pub(crate) fn main() -> ExitCode {
    ExitCode::FAILURE
}
