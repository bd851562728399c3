//! PCI: the bus, its configuration mechanisms, configuration spaces, and MSI-X (PCI Local Bus Specification 3.0).
//!
//! Belongs here: [`bus`], which finds a function by its device number or the address of its window;
//! [`configuration`], the registers of a function's configuration space; and [`msix`]. Does not belong here: anything
//! about virtio or KVM. The vmm creates the bus; `devices::virtio::transport::pci` has the functions.
//!
//! The bus is number 0 of segment 0, without bridges. Each device has one function, and each function at most one
//! window: base address register 0, 32 bits wide, for memory.

pub(crate) mod bus;
pub(crate) mod configuration;
pub(crate) mod msix;
