//! Attaches devices to the bus: each gets a register window, an interrupt line, and one kick eventfd per queue.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{
    boot::mptable::IO_APIC_LINES,
    error::{MachineError, device_error},
    kvm::Vm,
};
use crate::{
    devices::{
        bus::Bus,
        counters::Counters,
        virtio::{
            device::Device,
            interrupt::InterruptLine,
            mmio::{HotplugSlot, Mmio, NOTIFY_OFFSET, WINDOW_SIZE},
        },
    },
    memory::{DEVICE_WINDOW, GuestMemory},
};

/// The first interrupt line of a device. Lower lines belong to the legacy devices of a PC.
const FIRST_DEVICE_LINE: u32 = 5;

/// The position of a device on the bus.
#[derive(Debug, Clone, Copy)]
pub(super) struct BusAddress {
    /// The guest physical address of the register window.
    pub(super) base: u64,
    /// The line of the I/O APIC.
    pub(super) line: u32,
}

/// A slot that is reserved for hot-plugged devices.
#[derive(Debug)]
pub(super) struct ReservedSlot {
    pub(super) address: BusAddress,
    pub(super) slot: HotplugSlot,
}

pub(super) fn eventfd() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_CLOEXEC).map_err(device_error("create an eventfd"))
}

/// Creates one eventfd per queue of `device`.
pub(super) fn create_kicks(device: &dyn Device) -> Result<Vec<EventFd>, MachineError> {
    device.queue_sizes().iter().map(|_| eventfd()).collect()
}

/// Connects the interrupt line and the kicks of a device to the guest, at `address`.
pub(super) fn connect_to_kvm(
    vm: &Vm,
    memory: &GuestMemory,
    address: BusAddress,
    device: Box<dyn Device>,
    line: Arc<InterruptLine>,
    kicks: Vec<EventFd>,
) -> Result<Mmio, MachineError> {
    vm.register_irqfd(line.irqfd(), address.line)?;
    for (queue_index, kick) in (0..).zip(&kicks) {
        vm.register_ioeventfd(kick, address.base + NOTIFY_OFFSET, queue_index)?;
    }
    Ok(Mmio::new(device, memory.clone(), line, kicks))
}

/// Builds the bus of a machine, and the kernel arguments by which the guest finds the devices (`virtio_mmio.device=`).
pub(super) struct BusBuilder<'v> {
    vm: &'v Vm,
    memory: GuestMemory,
    pub(super) bus: Bus,
    /// Begins with a space, unless it is empty.
    pub(super) kernel_arguments: String,
    /// The counters of the devices of [`Self::add`].
    pub(super) counters: Vec<Arc<Counters>>,
    device_count: u32,
}

impl<'v> BusBuilder<'v> {
    pub(super) fn new(vm: &'v Vm, memory: GuestMemory) -> Self {
        Self {
            vm,
            memory,
            bus: Bus::default(),
            kernel_arguments: String::new(),
            counters: Vec::new(),
            device_count: 0,
        }
    }

    /// Adds a device. Returns the kick of each queue.
    pub(super) fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, MachineError> {
        let line = Arc::new(InterruptLine::new(eventfd()?));
        self.counters.push(device.counters());
        self.add_with_line(device, line)
    }

    /// Adds a device that interrupts over `line` and that counts nothing. Returns the kick of each queue.
    pub(super) fn add_with_line(
        &mut self,
        device: Box<dyn Device>,
        line: Arc<InterruptLine>,
    ) -> Result<Vec<EventFd>, MachineError> {
        let address = self.allocate_address()?;
        let kicks = create_kicks(&*device)?;
        let clones = kicks
            .iter()
            .map(|kick| {
                kick.try_clone()
                    .map_err(device_error("duplicate an eventfd of a device"))
            })
            .collect::<Result<_, _>>()?;
        let transport = connect_to_kvm(self.vm, &self.memory, address, device, line, kicks)?;
        self.bus
            .add(address.base..address.base + WINDOW_SIZE, Box::new(transport));
        Ok(clones)
    }

    /// Reserves a slot for hot-plugged devices.
    pub(super) fn reserve(&mut self) -> Result<ReservedSlot, MachineError> {
        let (address, slot) = (self.allocate_address()?, HotplugSlot::default());
        self.bus
            .add(address.base..address.base + WINDOW_SIZE, Box::new(slot.clone()));
        Ok(ReservedSlot { address, slot })
    }

    /// Allocates the next window and line, and adds them to the kernel arguments.
    fn allocate_address(&mut self) -> Result<BusAddress, MachineError> {
        use std::fmt::Write;

        let line = FIRST_DEVICE_LINE + self.device_count;
        if line >= u32::from(IO_APIC_LINES) {
            return Err(MachineError::InterruptLines);
        }
        let base = DEVICE_WINDOW.start + u64::from(self.device_count) * WINDOW_SIZE;
        self.device_count += 1;
        // Writing to a string cannot fail.
        let _ = write!(
            self.kernel_arguments,
            " virtio_mmio.device={WINDOW_SIZE}@{base:#x}:{line}"
        );
        Ok(BusAddress { base, line })
    }
}
