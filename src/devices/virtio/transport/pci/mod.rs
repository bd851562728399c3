//! The PCI transport (virtio 1.3 §4.1): a function whose window has the registers of the device.
//!
//! [`capabilities`] describes their locations to the driver, [`interrupt`] turns the notifications of the device into
//! MSI-X messages.

mod capabilities;
mod interrupt;
#[cfg(test)]
mod tests;

use std::{io, ops::Range, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::capabilities::WINDOW_SIZE;
use self::{
    capabilities::{COMMON, DEVICE, Layout, MESSAGE_TABLE, NOTIFY, NOTIFY_MULTIPLIER, PENDING_BITS},
    interrupt::MessageInterrupt,
};
use super::{NegotiatedDevice, negotiation::QueueArea};
use crate::{
    devices::{
        pci::{
            bus::Function,
            configuration::{Configuration, Identity},
            msix::{MessageTable, MessageVector},
        },
        virtio::device::{Device, copy_config},
    },
    memory::GuestMemory,
};

/// The vendor of virtio devices (virtio 1.3 §4.1.2).
const VENDOR: u16 = 0x1af4;
/// The PCI device ID of a virtio device is this plus its virtio device ID.
const FIRST_DEVICE_ID: u16 = 0x1040;
/// At least 0x40 for devices without the legacy interface (virtio 1.3 §4.1.2.1). Drivers for Windows look for this one,
/// which is QEMU's.
const SUBSYSTEM: u16 = 0x1100;

/// Base class and subclass of a network adapter, a storage device, and anything else (PCI Code and ID Assignment 1.11).
const CLASS_NETWORK: u32 = 0x02_0000;
const CLASS_STORAGE: u32 = 0x01_8000;
const CLASS_OTHER: u32 = 0xff_0000;

const VIRTIO_ID_NET: u32 = 1;
const VIRTIO_ID_BLOCK: u32 = 2;

/// Registers of the common configuration (virtio 1.3 §4.1.4.3, `struct virtio_pci_common_cfg`), by offset and size.
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: (u64, usize) = (0, 4);
    pub(super) const DEVICE_FEATURE: (u64, usize) = (4, 4);
    pub(super) const DRIVER_FEATURE_SELECT: (u64, usize) = (8, 4);
    pub(super) const DRIVER_FEATURE: (u64, usize) = (12, 4);
    pub(super) const CONFIG_MSIX_VECTOR: (u64, usize) = (16, 2);
    pub(super) const NUM_QUEUES: (u64, usize) = (18, 2);
    pub(super) const DEVICE_STATUS: (u64, usize) = (20, 1);
    pub(super) const CONFIG_GENERATION: (u64, usize) = (21, 1);
    pub(super) const QUEUE_SELECT: (u64, usize) = (22, 2);
    pub(super) const QUEUE_SIZE: (u64, usize) = (24, 2);
    pub(super) const QUEUE_MSIX_VECTOR: (u64, usize) = (26, 2);
    pub(super) const QUEUE_ENABLE: (u64, usize) = (28, 2);
    pub(super) const QUEUE_NOTIFY_OFF: (u64, usize) = (30, 2);
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
    /// The size of the structure in bytes, without the registers of VIRTIO_F_RING_RESET and VIRTIO_F_NOTIF_CONFIG_DATA.
    pub(super) const SIZE: usize = 56;
}

/// The notification addresses of a device's queues. The vmm implements it with ioeventfds of KVM. Dropping it removes
/// them.
pub(crate) trait Doorbells: Send {
    /// Signals the kick of queue n when the guest writes to the address `start` + n × `step`. `None` removes the
    /// addresses.
    ///
    /// # Errors
    ///
    /// Some addresses may be missing then: the writes arrive at the transport, which signals the kicks itself.
    fn move_to(&mut self, start: Option<u64>, step: u64) -> io::Result<()>;
}

/// A device on the PCI transport.
#[derive(Debug)]
pub(crate) struct VirtioFunction {
    device: NegotiatedDevice,
    name: String,
    configuration: Configuration,
    layout: Layout,
    messages: MessageTable,
    interrupt: Arc<MessageInterrupt>,
    doorbells: DoorbellPlace,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

/// The doorbells and their current address.
struct DoorbellPlace {
    doorbells: Box<dyn Doorbells>,
    start: Option<u64>,
}

/// The resources that connect a function to the machine.
pub(crate) struct Connection {
    /// The guest physical address of the window, a multiple of [`WINDOW_SIZE`].
    pub(crate) window: u32,
    /// One per queue.
    pub(crate) kicks: Vec<EventFd>,
    /// One per queue, and one for changes of the configuration.
    pub(crate) vectors: Vec<Box<dyn MessageVector>>,
    pub(crate) doorbells: Box<dyn Doorbells>,
}

impl VirtioFunction {
    /// Creates the transport of `device`.
    ///
    /// # Errors
    ///
    /// The eventfd of a vector cannot be duplicated.
    pub(crate) fn new(device: Box<dyn Device>, memory: GuestMemory, connection: Connection) -> io::Result<Self> {
        let Connection {
            window,
            kicks,
            vectors,
            doorbells,
        } = connection;
        let name = device.counters().name().to_owned();
        let id = device.device_id();
        let mut configuration = Configuration::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + u16::try_from(id).unwrap_or(0),
            revision: 1,
            class: match id {
                VIRTIO_ID_NET => CLASS_NETWORK,
                VIRTIO_ID_BLOCK => CLASS_STORAGE,
                _ => CLASS_OTHER,
            },
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        configuration.set_window(window, WINDOW_SIZE);
        let messages = MessageTable::new(name.clone(), vectors);
        let layout = Layout::add_to(&mut configuration, &messages);
        let interrupt = Arc::new(MessageInterrupt::new(messages.events()?, kicks.len()));
        Ok(Self {
            device: NegotiatedDevice::new(device, memory, kicks, interrupt.clone()),
            name,
            configuration,
            layout,
            messages,
            interrupt,
            doorbells: DoorbellPlace { doorbells, start: None },
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        })
    }

    /// Moves the doorbells to the current address of the window.
    fn place_doorbells(&mut self) {
        let start = self.configuration.window().map(|window| window.start + NOTIFY.start);
        if start == self.doorbells.start {
            return;
        }
        self.doorbells.start = start;
        if let Err(error) = self.doorbells.doorbells.move_to(start, NOTIFY_MULTIPLIER.into()) {
            log::warn!(
                target: &self.name,
                "each kick of a queue costs an exit to user space: cannot move the ioeventfds of the queues: {error}"
            );
        }
    }

    /// The registers of the common configuration.
    fn common_registers(&self) -> [u8; register::SIZE] {
        let mut bytes = [0; register::SIZE];
        let negotiation = &self.device.negotiation;
        let queue: u32 = self.queue_select.into();
        let accepted = super::half_of(negotiation.accepted(), self.driver_feature_select);
        let queue_count = u16::try_from(negotiation.queue_count()).unwrap_or(u16::MAX);
        let exists = negotiation.queue_max_size(queue) > 0;
        let mut set = |(offset, size): (u64, usize), value: u64| {
            let start = usize::try_from(offset).unwrap_or(0);
            bytes[start..start + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        set(register::DEVICE_FEATURE_SELECT, self.device_feature_select.into());
        set(
            register::DEVICE_FEATURE,
            self.device.offered_features(self.device_feature_select).into(),
        );
        set(register::DRIVER_FEATURE_SELECT, self.driver_feature_select.into());
        set(register::DRIVER_FEATURE, accepted.into());
        set(register::CONFIG_MSIX_VECTOR, self.interrupt.config_vector().into());
        set(register::NUM_QUEUES, queue_count.into());
        set(register::DEVICE_STATUS, negotiation.status().into());
        set(
            register::CONFIG_GENERATION,
            self.device.device.config_generation().into(),
        );
        set(register::QUEUE_SELECT, queue.into());
        set(register::QUEUE_SIZE, negotiation.queue_size(queue).into());
        set(
            register::QUEUE_MSIX_VECTOR,
            self.interrupt.queue_vector(self.queue_select).into(),
        );
        set(register::QUEUE_ENABLE, negotiation.is_queue_ready(queue).into());
        set(register::QUEUE_NOTIFY_OFF, if exists { queue.into() } else { 0 });
        for (offset, area) in QUEUE_AREAS {
            set((offset, 8), negotiation.queue_address(queue, area));
        }
        bytes
    }

    /// Writes a register of the common configuration. An access must have the width of the register; a 64-bit register
    /// may also be written as two 32-bit halves (virtio 1.3 §4.1.3.1). Other accesses are ignored.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else {
            return;
        };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (low, high) = (super::half_of(value, 0), super::half_of(value, 1));
        let short = u16::try_from(value).unwrap_or(u16::MAX);
        let queue: u32 = self.queue_select.into();
        match (offset, data.len()) {
            register::DEVICE_FEATURE_SELECT => self.device_feature_select = low,
            register::DRIVER_FEATURE_SELECT => self.driver_feature_select = low,
            register::DRIVER_FEATURE => self.device.negotiation.accept_features(self.driver_feature_select, low),
            register::CONFIG_MSIX_VECTOR => self.interrupt.set_config_vector(short),
            register::DEVICE_STATUS => self.write_status(low),
            register::QUEUE_SELECT => self.queue_select = short,
            register::QUEUE_SIZE => self.device.negotiation.set_queue_size(queue, low),
            register::QUEUE_MSIX_VECTOR => self.interrupt.set_queue_vector(self.queue_select, short),
            // A driver must not write 0 (virtio 1.3 §4.1.4.3.2).
            register::QUEUE_ENABLE if value == 1 => self.device.negotiation.set_queue_ready(queue, true),
            (offset, size @ (4 | 8)) => {
                for (start, area) in QUEUE_AREAS {
                    let mut set = |is_high, value| {
                        self.device.negotiation.set_queue_address(queue, area, is_high, value);
                    };
                    if offset == start {
                        set(false, low);
                        if size == 8 {
                            set(true, high);
                        }
                    } else if offset == start + 4 && size == 4 {
                        set(true, low);
                    }
                }
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if self.device.write_status(value) {
            self.interrupt.reset();
            self.messages.clear_pending();
            self.queue_select = 0;
            self.device_feature_select = 0;
            self.driver_feature_select = 0;
        }
    }

    /// The access to the window that the PCI configuration access capability describes (virtio 1.3 §4.1.4.9), if it is
    /// valid: its offset and length.
    fn indirect_access(&self) -> Option<(u64, usize)> {
        let (bar, offset, length) = self.layout.indirect_access(&self.configuration);
        let length = usize::try_from(length)
            .ok()
            .filter(|length| matches!(length, 1 | 2 | 4))?;
        let end = u64::from(offset) + length as u64;
        (bar == 0 && end <= WINDOW_SIZE.into()).then_some((offset.into(), length))
    }
}

/// The queue's areas, and the offsets of their addresses in the common configuration.
const QUEUE_AREAS: [(u64, QueueArea); 3] = [
    (register::QUEUE_DESC, QueueArea::Descriptors),
    (register::QUEUE_DRIVER, QueueArea::Driver),
    (register::QUEUE_DEVICE, QueueArea::Device),
];

impl Function for VirtioFunction {
    fn read_configuration(&mut self, offset: usize, data: &mut [u8]) {
        if self.layout.is_indirect_data(offset)
            && let Some((window_offset, length)) = self.indirect_access()
        {
            let mut bytes = [0; 4];
            self.read_window(window_offset, &mut bytes[..length]);
            self.layout.set_indirect_data(&mut self.configuration, bytes);
        }
        self.configuration.read(offset, data);
    }

    fn write_configuration(&mut self, offset: usize, data: &[u8]) {
        let was_bus_master = self.configuration.is_bus_master();
        self.configuration.write(offset, data);
        if was_bus_master && !self.configuration.is_bus_master() {
            // A kernel clears this bit before kexec, to stop its devices.
            self.write_status(0);
        }
        self.messages.update_control(&self.configuration, self.layout.messages);
        self.place_doorbells();
        if self.layout.is_indirect_data(offset)
            && let Some((window_offset, length)) = self.indirect_access()
        {
            let bytes = self.layout.indirect_data(&self.configuration);
            self.write_window(window_offset, &bytes[..length]);
        }
    }

    fn window(&self) -> Option<Range<u64>> {
        self.configuration.window()
    }

    fn read_window(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if COMMON.contains(&offset) {
            copy_config(&self.common_registers(), offset - COMMON.start, data);
        } else if DEVICE.contains(&offset) {
            self.device.device.read_config(offset - DEVICE.start, data);
        } else if MESSAGE_TABLE.contains(&offset) {
            self.messages.read_table(offset - MESSAGE_TABLE.start, data);
        } else if PENDING_BITS.contains(&offset) {
            self.messages.read_pending(offset - PENDING_BITS.start, data);
        }
        // The interrupt status register is always zero, since there is no interrupt pin (virtio 1.3 §4.1.4.5).
    }

    fn write_window(&mut self, offset: u64, data: &[u8]) {
        // The configurations of all devices are read-only.
        if COMMON.contains(&offset) {
            self.write_common(offset - COMMON.start, data);
        } else if MESSAGE_TABLE.contains(&offset) {
            self.messages.write_table(offset - MESSAGE_TABLE.start, data);
        } else if NOTIFY.contains(&offset) {
            // KVM handles most notifications. This one came through the configuration space, or an ioeventfd is
            // missing.
            let queue = usize::try_from((offset - NOTIFY.start) / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
            if let Some(kick) = self.device.kicks.get(queue) {
                // The counter cannot overflow: each write adds one, and the device reads it.
                let _ = kick.write(1);
            }
        }
    }
}

impl std::fmt::Debug for DoorbellPlace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:x?}", self.start)
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Connection")
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}
