//! The board for containers: virtio-mmio devices at fixed addresses with an interrupt line each, listed in the kernel's
//! arguments; processors in an MP table; the early console's UART.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Board, Buses, Slot, create_kicks, duplicate, eventfd};
use crate::{
    devices::{
        console_tail::ConsoleTail,
        uart::{self, Uart},
        virtio::{
            device::Device,
            transport::mmio::{HotplugSlot, InterruptLine, Mmio, NOTIFY_OFFSET, WINDOW_SIZE},
        },
    },
    memory::{DEVICE_WINDOW, GuestMemory, MemoryRegions},
    vmm::{
        boot::{
            BootError,
            mptable::{self, IO_APIC_LINES},
        },
        error::{MachineError, device_error},
        kvm::VmEvents,
    },
};

/// The first interrupt line of a device. Lower lines belong to the legacy devices of a PC.
const FIRST_DEVICE_LINE: u32 = 5;

/// The first I/O port for notifications. Each device has one port of 16 bits, which takes two port addresses. No device
/// of a PC uses this range.
const FIRST_NOTIFY_PORT: u16 = 0x1000;

/// The position of a device on the bus.
#[derive(Debug, Clone, Copy)]
struct BusAddress {
    /// The guest physical address of the register window.
    base: u64,
    notify_port: u16,
    /// The line of the I/O APIC.
    line: u32,
}

/// The board, while it is built.
#[derive(Debug)]
pub(in crate::vmm) struct ContainerBoard {
    events: VmEvents,
    memory: GuestMemory,
    buses: Buses,
    kernel_arguments: String,
    device_count: u16,
}

impl ContainerBoard {
    /// A board without devices, whose early console is appended to `console_tail`.
    pub(in crate::vmm) fn new(events: &VmEvents, memory: &GuestMemory, console_tail: &Arc<ConsoleTail>) -> Self {
        let mut buses = Buses::default();
        let first = u64::from(uart::FIRST_PORT);
        buses.ports.add(
            first..first + u64::from(uart::PORT_COUNT),
            Box::new(Uart::new(console_tail.clone())),
        );
        Self {
            events: events.clone(),
            memory: memory.clone(),
            buses,
            kernel_arguments: String::new(),
            device_count: 0,
        }
    }

    /// Allocates the next register window, interrupt line and notification port. Adds the first two to the kernel
    /// arguments; the driver reads the port from the upper half of the vendor ID.
    fn allocate_address(&mut self) -> Result<BusAddress, MachineError> {
        use std::fmt::Write;

        let line = FIRST_DEVICE_LINE + u32::from(self.device_count);
        if line >= u32::from(IO_APIC_LINES) {
            return Err(MachineError::TooManyDevices);
        }
        let base = DEVICE_WINDOW.start + u64::from(self.device_count) * WINDOW_SIZE;
        let notify_port = FIRST_NOTIFY_PORT + 2 * self.device_count;
        self.device_count += 1;
        // Writing to a string cannot fail.
        let _ = write!(
            self.kernel_arguments,
            " virtio_mmio.device={WINDOW_SIZE}@{base:#x}:{line}"
        );
        Ok(BusAddress {
            base,
            notify_port,
            line,
        })
    }
}

impl Board for ContainerBoard {
    fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, MachineError> {
        let address = self.allocate_address()?;
        let counters = device.counters();
        let irqfd = eventfd(format!("create an eventfd for the device {}", counters.name()))?;
        let kicks = create_kicks(&*device)?;
        let clones = duplicate(&kicks, counters.name())?;
        register(&self.events, address, &irqfd, &kicks)?;
        let line = Arc::new(InterruptLine::new(irqfd));
        let transport = Mmio::new(device, self.memory.clone(), line, kicks, address.notify_port);
        self.buses
            .memory
            .add(address.base..address.base + WINDOW_SIZE, Box::new(transport));
        Ok(clones)
    }

    fn reserve_slot(&mut self) -> Result<Box<dyn Slot>, MachineError> {
        let (address, slot) = (self.allocate_address()?, HotplugSlot::default());
        self.buses
            .memory
            .add(address.base..address.base + WINDOW_SIZE, Box::new(slot.clone()));
        Ok(Box::new(MmioSlot {
            events: self.events.clone(),
            memory: self.memory.clone(),
            address,
            slot,
            registered: None,
        }))
    }

    fn kernel_arguments(&self) -> &str {
        &self.kernel_arguments
    }

    fn write_tables(&self, memory: &MemoryRegions, max_vcpus: u8) -> Result<(), MachineError> {
        Ok(mptable::write(memory, max_vcpus).map_err(BootError::from)?)
    }

    fn finish(self: Box<Self>) -> Buses {
        self.buses
    }
}

/// A window of device registers and an interrupt line, for a device that is plugged in later.
#[derive(Debug)]
struct MmioSlot {
    events: VmEvents,
    memory: GuestMemory,
    address: BusAddress,
    slot: HotplugSlot,
    /// The eventfds that KVM has for this slot, registered with the first device. Later devices use the same ones.
    registered: Option<SlotEvents>,
}

#[derive(Debug)]
struct SlotEvents {
    irqfd: EventFd,
    kicks: Vec<EventFd>,
}

impl Slot for MmioSlot {
    fn plug(&mut self, number: u32, device: Box<dyn Device>, kicks: Vec<EventFd>) -> Result<(), MachineError> {
        if !self.slot.is_empty() {
            return Err(MachineError::Slot(number));
        }
        let registered = match self.registered.take() {
            Some(registered) if registered.kicks.len() == kicks.len() => registered,
            Some(registered) => {
                let error = MachineError::SlotQueues {
                    slot: number,
                    registered: registered.kicks.len(),
                    queues: kicks.len(),
                };
                self.registered = Some(registered);
                return Err(error);
            }
            None => {
                let irqfd = eventfd(format!("create an eventfd for slot {number}"))?;
                register(&self.events, self.address, &irqfd, &kicks)?;
                SlotEvents { irqfd, kicks }
            }
        };
        let registered = self.registered.insert(registered);
        let irqfd = registered
            .irqfd
            .try_clone()
            .map_err(device_error(format!("duplicate the eventfd of slot {number}")))?;
        let kicks = duplicate(&registered.kicks, device.counters().name())?;
        let line = Arc::new(InterruptLine::new(irqfd));
        let transport = Mmio::new(device, self.memory.clone(), line, kicks, self.address.notify_port);
        if self.slot.plug(transport) {
            Ok(())
        } else {
            Err(MachineError::Slot(number))
        }
    }

    fn is_empty(&self) -> bool {
        self.slot.is_empty()
    }

    fn unplugger(&self) -> Box<dyn FnOnce() + Send> {
        let slot = self.slot.clone();
        Box::new(move || slot.unplug())
    }
}

/// Connects the interrupt line and the kicks of the device at `address` to the guest.
fn register(events: &VmEvents, address: BusAddress, irqfd: &EventFd, kicks: &[EventFd]) -> Result<(), MachineError> {
    events.register_irqfd(irqfd, address.line)?;
    for (queue_index, kick) in (0..).zip(kicks) {
        events.register_ioeventfd(kick, address.base + NOTIFY_OFFSET, queue_index.into())?;
        events.register_port_ioeventfd(kick, address.notify_port, queue_index)?;
    }
    Ok(())
}
