//! The entry points of the fuzz targets for the executable's code.
//!
//! Belongs here: functions that pass the bytes of an input to code that reads untrusted bytes, and panic if it breaks
//! its contract. Does not belong here: anything that runs outside of tests. An entry point that needs private items is
//! next to these items, in a file `fuzz.rs`. The targets in `fuzz/fuzz_targets` call these functions, and so do the
//! tests, with the stored inputs.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

mod pc_board;
mod pci;
mod plans;
#[cfg(test)]
mod tests;

pub use self::{
    pc_board::access_pc_board,
    pci::access_pci,
    plans::{plan_bundle, plan_sandbox},
};
pub use crate::{
    devices::virtio::{
        block::serve_disk,
        fs::receive_replies,
        fuzz::{parse_chains, serve_devices},
        named_port::control_port,
        net::{answer_request, move_packets},
        transport::mmio::fuzz::access_registers,
        vsock::exchange_packets,
    },
    fs::{serve_files, serve_vmm},
    shim::{parse_start_request, receive_answers, receive_disk_kernel},
    vmm::load_kernel,
};
use crate::{shim::receive_notices, vmm::receive_commands};

/// Receives packets of the control channel, to the shim or to the vmm as the first byte of `data` says.
///
/// # Panics
///
/// Under the conditions of [`receive_notices`] and [`receive_commands`].
pub fn receive_control_messages(data: &[u8]) {
    match data.split_first() {
        Some((direction, packets)) if direction & 1 == 0 => receive_notices(packets),
        Some((_, packets)) => receive_commands(packets),
        None => {}
    }
}
