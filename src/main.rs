//! `containerd-shim-nutshell-v2`: one executable, four roles, told apart by the first argument.
//!
//! containerd starts it as a v2 shim (`start`, `delete`, `-info`, or nothing to serve). The shim
//! starts it again as `vmm` and, where directories are shared with the guest, as `fs`: each of
//! these drops every privilege it does not need before it reads anything that a guest wrote.
//! `check` is for people: it boots a guest and says whether this host can.

mod check;
mod control;
mod devices;
mod fs;
mod guest_image;
mod jail;
mod memory;
mod oci;
mod shim;
mod vmm;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(|role| role.to_str()) {
        Some(check::ROLE) => check::main(),
        Some(vmm::ROLE) => vmm::main(),
        Some(fs::ROLE) => fs::main(),
        _ => shim::main(),
    }
}
