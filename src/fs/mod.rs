//! The file server of a pod, a child of the shim, jailed.

use std::process::ExitCode;

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "fs";

/// Runs the role.
pub(crate) fn main() -> ExitCode {
    ExitCode::FAILURE
}
