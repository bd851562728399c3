//! The MMIO transport (virtio 1.3 §4.2).

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activation, Device, Interrupt,
    negotiation::{Area, Negotiation, Transition},
    queue::DeviceQueue,
};
use crate::devices::bus::Registers;
use crate::memory::GuestMemory;

/// How many bytes of address space a device has.
pub(crate) const WINDOW: u64 = 0x1000;

/// Where, from the device's base, the driver writes the index of a queue with new buffers; KVM
/// turns the write into an event of that queue's eventfd.
pub(crate) const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"nuts");
const CONFIG_SPACE: Range<u64> = VIRTIO_MMIO_CONFIG as u64..WINDOW;

/// The interrupt line of a device: a status register and an irqfd.
#[derive(Debug)]
pub(crate) struct InterruptLine {
    status: AtomicU32,
    irqfd: EventFd,
}

impl InterruptLine {
    /// A line that KVM raises when `irqfd` is written.
    pub(crate) fn new(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            irqfd,
        }
    }

    /// Makes every read of the interrupt status say that buffers were used, for a device whose
    /// backend is another process: it raises the irqfd itself and cannot set the status here. A
    /// driver that finds no used buffer ignores the interrupt (virtio 1.3 §2.7.7).
    pub(crate) fn always_used(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(1 << 31),
            irqfd,
        }
    }

    /// The irqfd, to hand to a backend.
    pub(crate) fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // An eventfd's counter cannot overflow by single increments that KVM consumes.
        let _ = self.irqfd.write(1);
    }

    fn read(&self) -> u32 {
        let status = self.status.load(Ordering::SeqCst);
        if status & 1 << 31 == 0 {
            status
        } else {
            status & !(1 << 31) | VIRTIO_MMIO_INT_VRING
        }
    }

    fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!(causes & 0xff), Ordering::SeqCst);
    }
}

impl Interrupt for InterruptLine {
    fn used(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}

/// A device on the MMIO transport.
pub(crate) struct Mmio {
    device: Box<dyn Device>,
    negotiation: Negotiation,
    memory: GuestMemory,
    line: Arc<InterruptLine>,
    kicks: Vec<EventFd>,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
}

impl Mmio {
    /// Puts `device` behind the transport; `kicks` holds the eventfd of each of its queues, which
    /// KVM signals on writes of the queue's index to [`NOTIFY`].
    pub(crate) fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        line: Arc<InterruptLine>,
        kicks: Vec<EventFd>,
    ) -> Self {
        Self {
            negotiation: Negotiation::new(device.features(), &device.queue_sizes()),
            device,
            memory,
            line,
            kicks,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => low_word(self.negotiation.offered()),
                1 => low_word(self.negotiation.offered() >> 32),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.negotiation.queue_max_size(self.queue_select).into(),
            VIRTIO_MMIO_QUEUE_READY => self.negotiation.queue_ready(self.queue_select).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.read(),
            VIRTIO_MMIO_STATUS => self.negotiation.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let queue = self.queue_select;
        let mut address = |area, high| self.negotiation.set_queue_address(queue, area, high, value);
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.negotiation.accept_features(self.driver_features_select, value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => self.negotiation.set_queue_size(queue, value),
            VIRTIO_MMIO_QUEUE_READY => self.negotiation.set_queue_ready(queue, value & 1 != 0),
            // KVM handles notifications; one that arrives here names a queue that does not exist.
            VIRTIO_MMIO_QUEUE_NOTIFY => {}
            VIRTIO_MMIO_INTERRUPT_ACK => self.line.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => address(Area::Descriptors, false),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => address(Area::Descriptors, true),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => address(Area::Driver, false),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => address(Area::Driver, true),
            VIRTIO_MMIO_QUEUE_USED_LOW => address(Area::Device, false),
            VIRTIO_MMIO_QUEUE_USED_HIGH => address(Area::Device, true),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        match self.negotiation.write_status(value, &self.memory) {
            Transition::None => {}
            Transition::Reset => {
                self.device.reset();
                self.line.acknowledge(0xff);
            }
            Transition::Activate { queues, features } => {
                if self.activate(queues, features).is_none() {
                    self.negotiation.fail();
                    self.line.config_changed();
                }
            }
        }
    }

    fn activate(&mut self, queues: Vec<virtio_queue::Queue>, features: u64) -> Option<()> {
        let queues = queues
            .into_iter()
            .zip(&self.kicks)
            .zip(0..)
            .map(|((queue, kick), index)| {
                let kick = kick.try_clone().ok()?;
                Some(DeviceQueue::new(
                    index,
                    queue,
                    kick,
                    self.memory.clone(),
                    self.line.clone(),
                ))
            })
            .collect::<Option<Vec<_>>>()?;
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.line.clone(),
        };
        self.device.activate(activation).ok()
    }
}

impl std::fmt::Debug for Mmio {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Mmio")
            .field("kind", &self.device.kind())
            .field("negotiation", &self.negotiation)
            .finish_non_exhaustive()
    }
}

impl Registers for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if CONFIG_SPACE.contains(&offset) {
            self.device.read_config(offset - CONFIG_SPACE.start, data);
        } else if let ([_, _, _, _], Ok(register)) = (&*data, u32::try_from(offset)) {
            data.copy_from_slice(&self.read_register(register).to_le_bytes());
        } else {
            // Registers are 32 bits wide and aligned (virtio 1.3 §4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device of ours has a configuration that the driver writes.
        if let (Ok(bytes), Ok(register)) = (<[u8; 4]>::try_from(data), u32::try_from(offset))
            && !CONFIG_SPACE.contains(&offset)
        {
            self.write_register(register, u32::from_le_bytes(bytes));
        }
    }
}

/// A place on the bus for a device that comes while the machine runs. While it is empty, a driver finds
/// device 0, which it ignores (virtio 1.3 §4.2.2).
#[derive(Debug, Clone, Default)]
pub(crate) struct HotplugSlot(Arc<Mutex<Option<Mmio>>>);

impl HotplugSlot {
    /// Puts a device there; `false` if there is one.
    #[must_use]
    pub(crate) fn fill(&self, device: Mmio) -> bool {
        let mut slot = self.lock();
        if slot.is_some() {
            return false;
        }
        *slot = Some(device);
        true
    }

    /// Takes the device away, if there is one: the driver's accesses find none from now on.
    pub(crate) fn empty(&self) {
        let device = self.lock().take();
        // Its workers end here, and processors that touch the slot do not wait for them.
        drop(device);
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_none()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Mmio>> {
        // A panic ends the process (see `vmm::main`): nobody sees a poisoned lock.
        self.0.lock()
    }
}

impl Registers for HotplugSlot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(device) = &mut *self.lock() {
            return device.read(offset, data);
        }
        data.fill(0);
        let register: u32 = match u32::try_from(offset) {
            Ok(VIRTIO_MMIO_MAGIC_VALUE) => MAGIC,
            Ok(VIRTIO_MMIO_VERSION) => VERSION,
            _ => 0,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = register.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(device) = &mut *self.lock() {
            device.write(offset, data);
        }
    }
}

fn low_word(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{queue::tests::memory, rng::Rng};

    fn transport() -> Mmio {
        let line = Arc::new(InterruptLine::new(EventFd::new(0).unwrap()));
        Mmio::new(Box::new(Rng::default()), memory(), line, vec![EventFd::new(0).unwrap()])
    }

    fn register(slot: &mut HotplugSlot, register: u32) -> u32 {
        let mut bytes = [0xff; 4];
        slot.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn empty_slot_is_a_device_that_drivers_ignore_until_it_is_filled_once() {
        let mut slot = HotplugSlot::default();
        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());
        assert_eq!(register(&mut slot, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(register(&mut slot, VIRTIO_MMIO_VERSION), VERSION);
        assert_eq!(register(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(register(&mut slot, VIRTIO_MMIO_STATUS), 0);
        let mut byte = [0xff];
        slot.read(u64::from(VIRTIO_MMIO_CONFIG), &mut byte);
        assert_eq!(byte, [0]);
        assert!(slot.is_empty());

        assert!(slot.fill(transport()));

        assert_eq!(register(&mut slot, VIRTIO_MMIO_DEVICE_ID), Rng::default().kind());
        assert!(!slot.is_empty());
        assert!(!slot.fill(transport()));
    }
}
