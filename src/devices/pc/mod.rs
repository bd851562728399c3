//! The devices of the PC board that are neither PCI nor virtio: the serial port COM1 with its output ring, the power
//! management timer, the power register and the generic event device.
//!
//! Belongs here: registers at I/O ports that a PC's firmware tables describe. Does not belong here: their addresses and
//! interrupt lines, which the vmm assigns. The vmm attaches each device to a bus of I/O ports, whose accesses arrive
//! from vCPU threads.

pub(crate) mod ged;
pub(crate) mod output_ring;
pub(crate) mod pm_timer;
pub(crate) mod power;
pub(crate) mod serial;
