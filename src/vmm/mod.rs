//! The machine. Runs as a child of the shim, jailed, one per pod: KVM, guest memory, boot, vCPU
//! threads and the event loop that drives the devices of [`crate::devices`].
//!
//! Nothing here opens a path, a socket or a network interface: every host resource arrives as a
//! descriptor over the [`control`] channel. The shim uses only [`control`] and [`ROLE`].

pub(crate) mod control;

use std::process::ExitCode;

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "vmm";

/// Runs the role: jail, then the machine until it ends.
pub(crate) fn main() -> ExitCode {
    ExitCode::FAILURE
}
