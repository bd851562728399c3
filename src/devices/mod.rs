//! The devices that the guest sees, and the bus that carries its accesses to them.
//!
//! Belongs here: the bus for memory and port accesses, [`pci`], [`pc`], the UART of the early console, the tail of
//! console output, the counters of devices, the timer that finds stalled queues, the system calls of devices' threads,
//! and [`virtio`]. Does not belong here: anything about KVM, containerd or paths. A device uses no host resource except
//! the descriptors that it was created with. The vmm creates devices and drives them from its event loop; the guest's
//! accesses arrive from vCPU threads through [`bus`].

pub(crate) mod bus;
pub(crate) mod console_tail;
pub(crate) mod counters;
#[cfg(test)]
pub(crate) mod log_capture;
pub(crate) mod output_sink;
pub(crate) mod pc;
pub(crate) mod pci;
pub(crate) mod stall_timer;
pub(crate) mod system_calls;
pub(crate) mod uart;
pub(crate) mod virtio;
