//! Virtio 1.3: devices, their queues, and the MMIO transport.
//!
//! Belongs here: [`device`], the interface between device and transport; [`negotiation`], the state machine of device
//! status and features, for any transport; [`mmio`], the transport; [`queue`] and [`buffers`], the data path; and one
//! file or folder per device. Does not belong here: anything about KVM. The vmm creates devices and attaches them to
//! the bus.
//!
//! The transport owns everything that a driver may change. When the driver sets DRIVER_OK, the queues move to the
//! device as immutable values ([`queue::DeviceQueue`]); the transport keeps none.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod buffers;
pub(crate) mod console;
pub(crate) mod device;
pub(crate) mod fs;
pub(crate) mod interrupt;
pub(crate) mod mem;
pub(crate) mod mmio;
#[cfg(test)]
pub(crate) mod mock;
pub(crate) mod negotiation;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod vsock;
