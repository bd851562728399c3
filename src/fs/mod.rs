//! The file server of a pod, a child of the shim, jailed.

use std::process::ExitCode;

use rustix::thread::CapabilitySet;

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "fs";

/// What the file server may do to files, and nothing else. The guest's kernel has checked what its
/// processes may do; this process then acts for all of their users, root among them.
pub(crate) const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    // Any user's file, whatever its mode.
    .union(CapabilitySet::DAC_OVERRIDE)
    // chmod, utimes and extended attributes of any user's file.
    .union(CapabilitySet::FOWNER)
    // Else writes and chmod would clear set-id bits that the guest's kernel wants kept.
    .union(CapabilitySet::FSETID)
    // New files belong to the guest's user and group: setfsuid, setfsgid.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    // Device nodes in a root file system; nobody opens them here, its mounts are nodev.
    .union(CapabilitySet::MKNOD)
    // File capabilities (`security.capability`): packages set them as they are installed.
    .union(CapabilitySet::SETFCAP);

/// Runs the role.
pub(crate) fn main() -> ExitCode {
    ExitCode::FAILURE
}
