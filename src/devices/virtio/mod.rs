//! Virtio 1.3: devices, their queues, and the MMIO and PCI transports.
//!
//! Belongs here: [`device`] and [`interrupt`], the interface between device and transport; [`transport`]; [`queue`] and
//! [`buffers`], the data path; and one file or folder per device. Does not belong here: anything about KVM. The vmm
//! creates devices and attaches them to the bus.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod buffers;
pub(crate) mod console;
pub(crate) mod device;
pub(crate) mod fs;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod interrupt;
pub(crate) mod mem;
#[cfg(test)]
pub(crate) mod mock;
pub(crate) mod named_port;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod transport;
pub(crate) mod vsock;
