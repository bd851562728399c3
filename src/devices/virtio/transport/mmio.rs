//! The MMIO transport (virtio 1.3 §4.2).

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    io,
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

use super::{NegotiatedDevice, negotiation::QueueArea};
use crate::{
    devices::{
        bus::Registers,
        virtio::{device::Device, interrupt::Interrupt},
    },
    memory::GuestMemory,
};

/// The size of a device's register window, in bytes.
pub(crate) const WINDOW_SIZE: u64 = 0x1000;

/// The offset of the QueueNotify register in the window. The driver writes the index of a queue with new buffers there,
/// and KVM signals that queue's eventfd.
pub(crate) const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"nuts");

/// The lower half of the vendor ID of a device without configuration changes. The upper half is the number of an I/O
/// port: a 16-bit write there has the effect of one to QueueNotify, but costs a cheaper exit. If an interrupt of the
/// device is for used buffers, it has no other cause that matters, so the driver need not read the status register. Only the driver of our guest kernel knows
/// this (`guest/kernel/patches/optional/virtio-mmio-ports.patch`). Others use the registers.
const VENDOR_WITH_PORT: u16 = u16::from_le_bytes(*b"nq");
const CONFIG_SPACE: Range<u64> = VIRTIO_MMIO_CONFIG as u64..WINDOW_SIZE;

/// A device on the MMIO transport.
#[derive(Debug)]
pub(crate) struct Mmio {
    device: NegotiatedDevice,
    line: Arc<InterruptLine>,
    vendor: u32,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
}

impl Mmio {
    /// Creates the transport of `device`, which interrupts over `line`. `kicks` has one eventfd per queue, which KVM
    /// signals when the driver writes the queue's index at [`NOTIFY_OFFSET`] or to the I/O port `notify_port`.
    pub(crate) fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        line: Arc<InterruptLine>,
        kicks: Vec<EventFd>,
        notify_port: u16,
    ) -> Self {
        let vendor = match device.changes_configuration() {
            true => VENDOR,
            false => u32::from(notify_port) << 16 | u32::from(VENDOR_WITH_PORT),
        };
        Self {
            device: NegotiatedDevice::new(device, memory, kicks, line.clone()),
            line,
            vendor,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => self.vendor,
            VIRTIO_MMIO_DEVICE_FEATURES => self.device.offered_features(self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.device.negotiation.queue_max_size(self.queue_select).into(),
            VIRTIO_MMIO_QUEUE_READY => self.device.negotiation.is_queue_ready(self.queue_select).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.status(),
            VIRTIO_MMIO_STATUS => self.device.negotiation.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let queue = self.queue_select;
        let mut set_address = |area, high| self.device.negotiation.set_queue_address(queue, area, high, value);
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self
                .device
                .negotiation
                .accept_features(self.driver_features_select, value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => self.device.negotiation.set_queue_size(queue, value),
            VIRTIO_MMIO_QUEUE_READY => self.device.negotiation.set_queue_ready(queue, value & 1 != 0),
            // KVM handles the notifications of existing queues. Others have no effect.
            VIRTIO_MMIO_QUEUE_NOTIFY => {}
            VIRTIO_MMIO_INTERRUPT_ACK => self.line.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_address(QueueArea::Descriptors, false),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_address(QueueArea::Descriptors, true),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_address(QueueArea::Driver, false),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_address(QueueArea::Driver, true),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_address(QueueArea::Device, false),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_address(QueueArea::Device, true),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if self.device.write_status(value) {
            self.line.reset();
        }
    }
}

impl Registers for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if CONFIG_SPACE.contains(&offset) {
            self.device.device.read_config(offset - CONFIG_SPACE.start, data);
        } else if let ([_, _, _, _], Ok(register)) = (&*data, u32::try_from(offset)) {
            data.copy_from_slice(&self.read_register(register).to_le_bytes());
        } else {
            // Registers are 32 bits wide and aligned (virtio 1.3 §4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The configurations of all devices are read-only.
        if let (Ok(bytes), Ok(register)) = (<[u8; 4]>::try_from(data), u32::try_from(offset))
            && !CONFIG_SPACE.contains(&offset)
        {
            self.write_register(register, u32::from_le_bytes(bytes));
        }
    }
}

/// A bit of [`InterruptLine::status`] that drivers do not see. If it is set, the status register always reports used
/// buffers.
const ALWAYS_USED: u32 = 1 << 31;

/// The bits of the status register that a driver can acknowledge.
const ACKNOWLEDGEABLE: u32 = 0xff;

/// The interrupt of a device on the MMIO transport: an interrupt status register (virtio 1.3 §4.2.2) and an irqfd.
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

    /// The status register as the driver reads it.
    fn status(&self) -> u32 {
        let status = self.status.load(Ordering::SeqCst);
        if status & ALWAYS_USED == 0 {
            status
        } else {
            status & !ALWAYS_USED | VIRTIO_MMIO_INT_VRING
        }
    }

    /// Clears `causes` in the status register.
    fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!(causes & ACKNOWLEDGEABLE), Ordering::SeqCst);
    }

    /// Clears the status register.
    fn reset(&self) {
        self.acknowledge(ACKNOWLEDGEABLE);
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // The counter cannot overflow: each write adds one, and KVM reads it.
        let _ = self.irqfd.write(1);
    }
}

impl Interrupt for InterruptLine {
    fn notify_used(&self, _queue_index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn notify_config_change(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// From now on, the status register always reports used buffers: the other process writes to the irqfd but cannot
    /// set the status. A driver ignores an interrupt without used buffers (virtio 1.3 §2.7.7).
    fn delegate(&self, _queue_index: u16) -> io::Result<EventFd> {
        self.status.fetch_or(ALWAYS_USED, Ordering::SeqCst);
        self.irqfd.try_clone()
    }
}

/// A slot on the bus for a device that is hot-plugged. While it is empty, it reads as device ID 0, which drivers ignore
/// (virtio 1.3 §4.2.2).
#[derive(Debug, Clone, Default)]
pub(crate) struct HotplugSlot(Arc<Mutex<Option<Mmio>>>);

impl HotplugSlot {
    /// Plugs `device` in. Returns `false` if the slot is occupied.
    #[must_use]
    pub(crate) fn plug(&self, device: Mmio) -> bool {
        let mut slot = self.lock();
        if slot.is_some() {
            return false;
        }
        *slot = Some(device);
        true
    }

    /// Unplugs the device, if there is one, and waits for its workers to end. For the guest, the slot is empty
    /// immediately.
    pub(crate) fn unplug(&self) {
        let device = self.lock().take();
        // Drop it without the lock, so that a vCPU that accesses the slot does not wait for the device's workers.
        drop(device);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_none()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Mmio>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{
        log_capture::LogCapture,
        stall_timer::StallTimer,
        virtio::{
            block::{Backing, Block},
            fs::Fs,
            mock::memory,
            rng::Rng,
        },
    };

    const NOTIFY_PORT: u16 = 0x1234;

    fn transport() -> Mmio {
        let line = Arc::new(InterruptLine::new(EventFd::new(0).unwrap()));
        Mmio::new(
            Box::new(Rng::default()),
            memory(),
            line,
            vec![EventFd::new(0).unwrap()],
            NOTIFY_PORT,
        )
    }

    fn register(slot: &mut HotplugSlot, register: u32) -> u32 {
        let mut bytes = [0xff; 4];
        slot.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Performs the driver's steps up to DRIVER_OK, with one queue of 16 entries.
    fn drive(mmio: &mut Mmio, queue_area: u32) {
        let write = |mmio: &mut Mmio, register: u32, value: u32| mmio.write(register.into(), &value.to_le_bytes());
        write(mmio, VIRTIO_MMIO_STATUS, 1);
        write(mmio, VIRTIO_MMIO_STATUS, 3);
        write(mmio, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(mmio, VIRTIO_MMIO_DRIVER_FEATURES, 1);
        write(mmio, VIRTIO_MMIO_STATUS, 11);
        write(mmio, VIRTIO_MMIO_QUEUE_NUM, 16);
        write(mmio, VIRTIO_MMIO_QUEUE_DESC_LOW, queue_area);
        write(mmio, VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue_area + 0x1000);
        write(mmio, VIRTIO_MMIO_QUEUE_USED_LOW, queue_area + 0x2000);
        write(mmio, VIRTIO_MMIO_QUEUE_READY, 1);
        write(mmio, VIRTIO_MMIO_STATUS, 15);
    }

    #[test]
    fn device_that_the_guest_cannot_use_is_logged_with_its_reason() {
        let event = || EventFd::new(0).unwrap();
        let line = || Arc::new(InterruptLine::new(event()));
        let (socket, server) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(server);
        let fs = Box::new(Fs::new("share", socket));
        let rng = || Box::new(Rng::default());
        let cases: [(&str, Box<dyn Device>, u32, &str); 3] = [
            ("fs", fs, 0x8000, "the device's backend failed: SET_OWNER: "),
            (
                "rng",
                rng(),
                0xff_0000,
                "its driver configured a queue that is invalid, or no queue",
            ),
            (
                "rng",
                rng(),
                0x8001,
                "its driver configured a queue that is invalid, or no queue",
            ),
        ];
        for (name, device, queue_area, reason) in cases {
            let (counters, log) = (device.counters(), LogCapture::on_this_thread(name));
            let kicks = device.queue_sizes().iter().map(|_| event()).collect();
            let mut mmio = Mmio::new(device, memory(), line(), kicks, NOTIFY_PORT);

            drive(&mut mmio, queue_area);

            let lines = log.lines();
            let [text] = &lines[..] else {
                panic!("{name}: {lines:?}")
            };
            let expected = format!("the guest cannot use this device: {reason}");
            assert!(text.starts_with(&expected), "{name}: {text}");
            assert_eq!(counters.read().errors, 1, "{name}");
        }
    }

    /// A driver that knows the port does not see configuration changes that coincide with used buffers.
    #[test]
    fn only_a_device_without_configuration_changes_has_a_port() {
        let port = u32::from(NOTIFY_PORT) << 16 | u32::from(VENDOR_WITH_PORT);
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let stall_timer = Arc::new(StallTimer::new().unwrap());
        let disk = || {
            let backing = Backing::File {
                file: file.try_clone().unwrap(),
                read_only: false,
            };
            Block::new("disk".to_owned(), backing, 1, &stall_timer).unwrap()
        };
        let mut growing = disk();
        let _watched = growing.growing_disk().unwrap();
        let cases: [(Box<dyn Device>, u32); 3] = [
            (Box::new(Rng::default()), port),
            (Box::new(disk()), port),
            (Box::new(growing), VENDOR),
        ];
        for (device, expected) in cases {
            let line = Arc::new(InterruptLine::new(EventFd::new(0).unwrap()));
            let mmio = Mmio::new(device, memory(), line, vec![EventFd::new(0).unwrap()], NOTIFY_PORT);
            assert_eq!(mmio.read_register(VIRTIO_MMIO_VENDOR_ID), expected);
        }
    }

    /// In another monitor, the size of a queue could change after its ring addresses had been checked for the old size.
    #[test]
    fn no_register_changes_a_queue_after_activation_cve_2026_5747() {
        let mut mmio = transport();
        drive(&mut mmio, 0x8000);
        let queue = |mmio: &Mmio| {
            let state = &mmio.device.negotiation;
            let areas = [QueueArea::Descriptors, QueueArea::Driver, QueueArea::Device];
            let addresses = areas.map(|area| state.queue_address(0, area));
            (state.queue_size(0), state.is_queue_ready(0), addresses, state.status())
        };
        let before = queue(&mmio);
        assert_eq!(before, (16, true, [0x8000, 0x9000, 0xa000], 15));
        let mut write = |register: u32, value: u32| mmio.write(register.into(), &value.to_le_bytes());

        for status in [11, 15] {
            write(VIRTIO_MMIO_STATUS, status);
            for size in [0, 1, 8, 32, 0x8000, u32::MAX] {
                write(VIRTIO_MMIO_QUEUE_NUM, size);
            }
            for register in [
                VIRTIO_MMIO_QUEUE_DESC_LOW,
                VIRTIO_MMIO_QUEUE_DESC_HIGH,
                VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
                VIRTIO_MMIO_QUEUE_USED_LOW,
                VIRTIO_MMIO_QUEUE_USED_HIGH,
            ] {
                write(register, 0xdead_0000);
            }
            for ready in [0, 1] {
                write(VIRTIO_MMIO_QUEUE_READY, ready);
            }
        }

        assert_eq!(queue(&mmio), before);
    }

    #[test]
    fn empty_slot_reads_as_device_0_until_a_device_is_plugged_in() {
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

        assert!(slot.plug(transport()));

        assert_eq!(register(&mut slot, VIRTIO_MMIO_DEVICE_ID), Rng::default().device_id());
        assert!(!slot.is_empty());
        assert!(!slot.plug(transport()));
    }
}
