//! `containerd-shim-nutshell-v2`: one executable with several roles, which the first argument selects.
//!
//! containerd starts it as a v2 shim: `start`, `delete`, `-info`, or without an action to serve. The shim starts it
//! again as `vmm` and, if a pod shares directories with its guest, as `fs`. Both drop all privileges that they do not
//! need before they read anything that a guest wrote. An administrator runs `check`, which boots a guest and reports
//! whether this host can run nutshell, `ps`, `metrics`, `inspect` and `console`, which show running pods, and `shell`,
//! which opens a shell in a guest. `disk inspect` examines a disk image, in a third jailed role, `disk-inspector`.

#![cfg_attr(fuzzing, allow(dead_code, reason = "fuzz targets use only a part of the mocks"))]

mod admin;
mod check;
mod control;
mod devices;
mod disk;
mod fs;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guest_image;
mod jail;
mod memory;
mod oci;
mod shim;
mod vmm;

use std::process::ExitCode;

/// Runs the role that the first argument of this process selects. Returns the exit code of the process.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(|role| role.to_str()) {
        Some(role) if admin::ROLES.contains(&role) => admin::main(),
        Some(check::ROLE) => check::main(),
        Some(disk::ROLE) => disk::main(),
        Some(disk::inspector::ROLE) => disk::inspector::main(),
        Some(vmm::ROLE) => vmm::main(),
        Some(fs::ROLE) => fs::main(),
        _ => shim::main(),
    }
}
