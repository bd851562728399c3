//! The board for kernels of distributions: a PCI bus, and the firmware tables of a PC whose only legacy device is COM1
//! (hardware-reduced ACPI).

use std::{ops::Range, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{Board, Buses, Slot, create_kicks, duplicate, eventfd};
use crate::{
    control::EndReason,
    devices::{
        bus::Registers,
        output_sink::OutputSink,
        pc::{
            ged::GenericEvents,
            pm_timer::PmTimer,
            power::{Power, PowerRequest},
            serial::Serial,
        },
        pci::bus::{ConfigurationPorts, ConfigurationWindow, DEVICE_COUNT, MemoryWindow, PciBus},
        virtio::{
            device::Device,
            transport::pci::{Connection, VirtioFunction, WINDOW_SIZE},
        },
    },
    memory::{GuestMemory, MemoryRegions},
    vmm::{
        boot::{
            BootError,
            acpi::{self, Vcpus},
            pc_layout::{
                BAR_WINDOW, COM1_LINE, COM1_PORTS, ECAM, EVENT_LINE, EVENT_PORTS, PCI_CONFIG_PORTS, PM_TIMER_PORTS,
                POWER_PORTS, RESERVED, RSDP,
            },
            reset_vector,
            smbios::{self, SystemIdentity},
        },
        end_signal::EndSignal,
        error::{MachineError, device_error},
        kvm::VmEvents,
        resources::Identity,
    },
};

/// The name of the machine in SMBIOS.
const PRODUCT: &str = "virtual machine";

/// The board, while it is built.
#[derive(Debug)]
pub(in crate::vmm) struct PcBoard {
    bus: Arc<PciBus>,
    builder: FunctionBuilder,
    buses: Buses,
    /// The number of the next device. 0 is the host bridge.
    next_device: usize,
    identity: Identity,
}

/// The devices of the board that the event loop drives.
#[derive(Debug)]
pub(in crate::vmm) struct PcDevices {
    pub(in crate::vmm) serial: Serial,
    pub(in crate::vmm) power_button: GenericEvents,
}

impl PcBoard {
    /// A board without PCI devices. Its serial port writes to `outputs`. A reset or a power-off by the guest is
    /// reported to `end`.
    pub(in crate::vmm) fn new(
        events: &VmEvents,
        memory: &GuestMemory,
        outputs: Vec<Arc<dyn OutputSink>>,
        identity: Identity,
        end: &Arc<EndSignal>,
    ) -> Result<(Self, PcDevices), MachineError> {
        let bus = PciBus::new();
        let mut buses = Buses::default();
        let line = |line: u8| {
            let irqfd = eventfd(format!("create an eventfd for interrupt line {line}"))?;
            events.register_irqfd(&irqfd, line.into())?;
            Ok::<_, MachineError>(irqfd)
        };
        let serial = Serial::new(line(COM1_LINE)?, outputs).map_err(device_error("set up the serial port"))?;
        let power_button = GenericEvents::new(line(EVENT_LINE)?);
        let end = end.clone();
        let power = Power::new(move |request| {
            end.report(match request {
                PowerRequest::Reset => EndReason::GuestReset,
                PowerRequest::PowerOff => EndReason::GuestPowerOff,
            });
        });
        let mut add = |ports: Range<u16>, device: Box<dyn Registers>| {
            buses.ports.add(ports.start.into()..ports.end.into(), device);
        };
        add(COM1_PORTS, Box::new(serial.clone()));
        add(EVENT_PORTS, Box::new(power_button.clone()));
        add(POWER_PORTS, Box::new(power));
        add(PM_TIMER_PORTS, Box::new(PmTimer::new()));
        add(PCI_CONFIG_PORTS, Box::new(ConfigurationPorts::new(bus.clone())));
        buses
            .memory
            .add_shared(ECAM, Arc::new(ConfigurationWindow(bus.clone())));
        let window = MemoryWindow {
            bus: bus.clone(),
            base: BAR_WINDOW.start,
        };
        buses.memory.add_shared(BAR_WINDOW, Arc::new(window));
        let board = Self {
            bus,
            builder: FunctionBuilder {
                events: events.clone(),
                memory: memory.clone(),
            },
            buses,
            next_device: 1,
            identity,
        };
        Ok((board, PcDevices { serial, power_button }))
    }

    fn allocate_device(&mut self) -> Result<usize, MachineError> {
        let device = self.next_device;
        if device >= DEVICE_COUNT {
            return Err(MachineError::TooManyDevices);
        }
        self.next_device += 1;
        Ok(device)
    }
}

impl Board for PcBoard {
    fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, MachineError> {
        let number = self.allocate_device()?;
        let kicks = create_kicks(&*device)?;
        let clones = duplicate(&kicks, device.counters().name())?;
        let function = self.builder.build(number, device, kicks)?;
        if self.bus.plug(number, Box::new(function)) {
            Ok(clones)
        } else {
            Err(MachineError::TooManyDevices)
        }
    }

    fn reserve_slot(&mut self) -> Result<Box<dyn Slot>, MachineError> {
        Ok(Box::new(PciSlot {
            bus: self.bus.clone(),
            builder: self.builder.clone(),
            device_number: self.allocate_device()?,
        }))
    }

    fn kernel_arguments(&self) -> &'static str {
        ""
    }

    fn reserved_addresses(&self) -> &[Range<u64>] {
        &RESERVED
    }

    fn acpi_root(&self) -> Option<u64> {
        Some(RSDP)
    }

    fn write_tables(&self, memory: &MemoryRegions, max_vcpus: u8) -> Result<(), MachineError> {
        let vcpus = Vcpus {
            enabled: max_vcpus,
            max: max_vcpus,
        };
        acpi::write(memory, vcpus).map_err(BootError::from)?;
        reset_vector::write(memory).map_err(BootError::from)?;
        let identity = SystemIdentity {
            product: PRODUCT,
            uuid: self.identity.uuid,
            oem_strings: &self.identity.oem_strings,
        };
        Ok(smbios::write(memory, &identity)?)
    }

    fn finish(self: Box<Self>) -> Buses {
        self.buses
    }
}

/// A reserved device number on the bus. While no device is plugged in, the guest sees nothing there.
#[derive(Debug)]
struct PciSlot {
    bus: Arc<PciBus>,
    builder: FunctionBuilder,
    device_number: usize,
}

impl Slot for PciSlot {
    fn plug(&mut self, number: u32, device: Box<dyn Device>, kicks: Vec<EventFd>) -> Result<(), MachineError> {
        let function = self.builder.build(self.device_number, device, kicks)?;
        if self.bus.plug(self.device_number, Box::new(function)) {
            Ok(())
        } else {
            Err(MachineError::Slot(number))
        }
    }

    fn is_empty(&self) -> bool {
        self.bus.is_empty(self.device_number)
    }

    fn unplugger(&self) -> Box<dyn FnOnce() + Send> {
        let (bus, device_number) = (self.bus.clone(), self.device_number);
        Box::new(move || bus.unplug(device_number))
    }
}

/// Builds the PCI functions of devices.
#[derive(Debug, Clone)]
struct FunctionBuilder {
    events: VmEvents,
    memory: GuestMemory,
}

impl FunctionBuilder {
    /// Builds the PCI function of `device`. Its device number `number` determines the initial address of its window.
    fn build(
        &self,
        number: usize,
        device: Box<dyn Device>,
        kicks: Vec<EventFd>,
    ) -> Result<VirtioFunction, MachineError> {
        let counters = device.counters();
        let failed = || device_error(format!("connect the device {} to the PCI bus", counters.name()));
        // One vector per queue, and one for changes of the configuration.
        let vectors = (0..=kicks.len())
            .map(|_| self.events.create_vector())
            .collect::<Result<_, _>>()
            .map_err(failed())?;
        let number = u32::try_from(number).map_err(|_| MachineError::TooManyDevices)?;
        let connection = Connection {
            window: u32::try_from(BAR_WINDOW.start).unwrap_or(0) + number * WINDOW_SIZE,
            doorbells: self.events.create_doorbells(&kicks).map_err(failed())?,
            kicks,
            vectors,
        };
        VirtioFunction::new(device, self.memory.clone(), connection).map_err(failed())
    }
}
