//! Boards: the buses of a machine, the addresses of its devices, and the tables by which the guest finds them.
//!
//! Belongs here: [`Board`] and its implementations, [`container`] (virtio-mmio, MP table) and [`pc`] (PCI, ACPI).
//! Does not belong here: the list of a machine's devices, in [`super::build`]. That module builds the machine on a
//! board; [`super::machine`] plugs devices into its slots.

pub(super) mod container;
pub(super) mod pc;

use std::{borrow::Cow, fmt, ops::Range};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::error::{MachineError, device_error};
use crate::{
    devices::{bus::Bus, virtio::device::Device},
    memory::MemoryRegions,
};

/// The board of a machine, while it is built.
pub(super) trait Board {
    /// Adds a device. Returns one eventfd per queue (its kick), which is signalled when the driver notifies the queue.
    fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, MachineError>;

    /// Reserves a slot for devices that are plugged in while the machine runs.
    fn reserve_slot(&mut self) -> Result<Box<dyn Slot>, MachineError>;

    /// The kernel arguments by which the guest finds the devices. Begins with a space, unless it is empty.
    fn kernel_arguments(&self) -> &str;

    /// Guest physical addresses that the guest's kernel must not use.
    fn reserved_addresses(&self) -> &[Range<u64>] {
        &[]
    }

    /// The guest physical address of ACPI's root pointer, if the board has ACPI.
    fn acpi_root(&self) -> Option<u64> {
        None
    }

    /// Writes the firmware tables to guest memory: the MP table; or ACPI, SMBIOS and the reset code. They list
    /// `max_vcpus` vCPUs.
    fn write_tables(&self, memory: &MemoryRegions, max_vcpus: u8) -> Result<(), MachineError>;

    /// Returns the buses with all devices.
    fn finish(self: Box<Self>) -> Buses;
}

/// The buses of a machine.
#[derive(Debug, Default)]
pub(super) struct Buses {
    /// By guest physical address.
    pub(super) memory: Bus,
    /// By I/O port.
    pub(super) ports: Bus,
}

/// A slot for a device that is plugged in while the machine runs. It connects the device to the guest.
pub(super) trait Slot: fmt::Debug + Send {
    /// Plugs in `device`, whose queues have the eventfds `kicks`. The guest finds it when it probes the slot again.
    /// `number` is the number of the slot, for error texts.
    fn plug(&mut self, number: u32, device: Box<dyn Device>, kicks: Vec<EventFd>) -> Result<(), MachineError>;

    fn is_empty(&self) -> bool;

    /// Returns a function that unplugs the device, if there is one, and waits for its workers to end. For the guest,
    /// the slot is empty as soon as the function is called.
    fn unplugger(&self) -> Box<dyn FnOnce() + Send>;
}

/// `step` is that of the error: a verb with its object.
pub(super) fn eventfd(step: impl Into<Cow<'static, str>>) -> Result<EventFd, MachineError> {
    EventFd::new(EFD_CLOEXEC).map_err(device_error(step))
}

/// Creates one eventfd per queue of `device`.
pub(super) fn create_kicks(device: &dyn Device) -> Result<Vec<EventFd>, MachineError> {
    let counters = device.counters();
    let create = |_: &u16| eventfd(format!("create an eventfd for the device {}", counters.name()));
    device.queue_sizes().iter().map(create).collect()
}

/// Duplicates the eventfds of the device `name`.
pub(super) fn duplicate(kicks: &[EventFd], name: &str) -> Result<Vec<EventFd>, MachineError> {
    let failed = || device_error(format!("duplicate an eventfd of the device {name}"));
    kicks.iter().map(|kick| kick.try_clone().map_err(failed())).collect()
}
