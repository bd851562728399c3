//! How a device comes to its place on the bus: a window of registers, an interrupt line and an eventfd for each
//! queue.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{
    boot,
    error::{BuildError, device},
    kvm::Vm,
};
use crate::{
    devices::{
        bus::Bus,
        virtio::{
            Device,
            mmio::{HotplugSlot, InterruptLine, Mmio, NOTIFY, WINDOW},
        },
    },
    memory::{DEVICE_WINDOW, GuestMemory},
};

/// The first interrupt line given to a device: lower ones are those of the PC's first devices.
const FIRST_LINE: u32 = 5;

/// Where a device is on the bus.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    pub(super) base: u64,
    pub(super) line: u32,
}

/// A place for a device that comes later.
#[derive(Debug)]
pub(super) struct ReservedSlot {
    pub(super) address: Address,
    pub(super) slot: HotplugSlot,
}

/// An eventfd for each queue.
pub(super) fn kicks_of(virtio: &dyn Device) -> Result<Vec<EventFd>, BuildError> {
    virtio.queue_sizes().iter().map(|_| eventfd()).collect()
}

/// Gives a device its interrupt line and the kick of each queue.
pub(super) fn connect(
    vm: &Vm,
    memory: &GuestMemory,
    address: Address,
    virtio: Box<dyn Device>,
    line: Arc<InterruptLine>,
    kicks: Vec<EventFd>,
) -> Result<Mmio, BuildError> {
    vm.interrupt_on(line.irqfd(), address.line)?;
    for (queue, kick) in (0..).zip(&kicks) {
        vm.signal_on_write(kick, address.base + NOTIFY, queue)?;
    }
    Ok(Mmio::new(virtio, memory.clone(), line, kicks))
}

pub(super) fn eventfd() -> Result<EventFd, BuildError> {
    EventFd::new(EFD_CLOEXEC).map_err(device("eventfd"))
}

/// Where devices are plugged in: gives each a window, an interrupt line, kicks, and the words of
/// the command line by which the kernel finds it (`virtio_mmio.device=`).
pub(super) struct Board<'v> {
    vm: &'v Vm,
    memory: GuestMemory,
    pub(super) bus: Bus,
    pub(super) arguments: String,
    count: u32,
}

impl<'v> Board<'v> {
    pub(super) fn new(vm: &'v Vm, memory: GuestMemory) -> Self {
        Self {
            vm,
            memory,
            bus: Bus::default(),
            arguments: String::new(),
            count: 0,
        }
    }

    pub(super) fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, BuildError> {
        let line = Arc::new(InterruptLine::new(eventfd()?));
        self.add_with_line(device, line)
    }

    /// Returns the kick of each queue.
    pub(super) fn add_with_line(
        &mut self,
        virtio: Box<dyn Device>,
        line: Arc<InterruptLine>,
    ) -> Result<Vec<EventFd>, BuildError> {
        let address = self.address()?;
        let kicks = kicks_of(&*virtio)?;
        let clones = kicks
            .iter()
            .map(|kick| kick.try_clone().map_err(device("eventfd")))
            .collect::<Result<_, _>>()?;
        let transport = connect(self.vm, &self.memory, address, virtio, line, kicks)?;
        self.bus.add(address.base..address.base + WINDOW, Box::new(transport));
        Ok(clones)
    }

    /// Keeps a place for a device that comes later.
    pub(super) fn reserve(&mut self) -> Result<ReservedSlot, BuildError> {
        let (address, slot) = (self.address()?, HotplugSlot::default());
        self.bus
            .add(address.base..address.base + WINDOW, Box::new(slot.clone()));
        Ok(ReservedSlot { address, slot })
    }

    /// The next window and line, of which the kernel is told.
    fn address(&mut self) -> Result<Address, BuildError> {
        use std::fmt::Write;

        let line = FIRST_LINE + self.count;
        if line >= u32::from(boot::mptable::LINES) {
            return Err(BuildError::Command("more devices than interrupt lines"));
        }
        let base = DEVICE_WINDOW.start + u64::from(self.count) * WINDOW;
        self.count += 1;
        // Writing to a string cannot fail.
        let _ = write!(self.arguments, " virtio_mmio.device={WINDOW}@{base:#x}:{line}");
        Ok(Address { base, line })
    }
}
