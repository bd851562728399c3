//! Devices that the guest sees, and the bus that carries its accesses to them.
//!
//! Lives here: the MMIO bus, the early console's UART, and [`virtio`]. May not live here: anything
//! that knows of KVM, containerd or a path. A device touches no host resource but the descriptors
//! that it was made with. The vmm builds devices and drives them from its event loop; what the
//! guest writes reaches them from vCPU threads through [`bus`].

pub(crate) mod bus;
pub(crate) mod uart;
pub(crate) mod virtio;
