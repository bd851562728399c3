//! The entry points of the fuzz targets for virtqueues and virtio devices, and the driver that they have in common.
//!
//! Belongs here: [`guest`], memory and queues as a driver fills them; [`driver`], a driver on the MMIO transport; and
//! the targets that need no private items of a device. Does not belong here: anything that runs outside of tests. The
//! target of a device with private items is in a file `fuzz.rs` next to them.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

mod chains;
mod devices;
pub(super) mod driver;
pub(super) mod guest;

pub use self::{chains::parse_chains, devices::serve_devices};
