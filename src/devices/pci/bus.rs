//! The PCI bus of a machine, and the two mechanisms by which a guest reaches configuration spaces: I/O ports 0xCF8 and
//! 0xCFC (PCI 3.0 §3.2.2.3.2), and the memory-mapped window of PCI Express (ECAM, PCI Express 6.0 §7.2.2).

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::configuration::{Configuration, Identity};
use crate::devices::bus::{Registers, SharedRegisters};

/// The number of devices on a bus.
pub(crate) const DEVICE_COUNT: usize = 32;

/// The host bridge, device 0. Its identity is that of Cloud Hypervisor's host bridge, which guests know.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A window that is not decoded.
const NO_WINDOW: u64 = u64::MAX;

/// Function 0 of a device. vCPU threads call these methods.
pub(crate) trait Function: Send {
    /// Fills `data` with the configuration registers from byte `offset` on.
    fn read_configuration(&mut self, offset: usize, data: &mut [u8]);

    /// Writes `data` to the configuration registers from byte `offset` on.
    fn write_configuration(&mut self, offset: usize, data: &[u8]);

    /// The guest physical addresses of the decoded window, if there is one.
    fn window(&self) -> Option<Range<u64>>;

    /// Fills `data` with the registers at `offset` in the window.
    fn read_window(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the registers at `offset` in the window.
    fn write_window(&mut self, offset: u64, data: &[u8]);
}

/// The bus: 32 devices, of which device 0 is the host bridge.
pub(crate) struct PciBus {
    devices: [BusSlot; DEVICE_COUNT],
}

/// The place of one device on the bus. Its function may be plugged in and unplugged while the machine runs.
#[derive(Default)]
struct BusSlot {
    function: Mutex<Option<Box<dyn Function>>>,
    /// The start of the function's window or [`NO_WINDOW`], so that a vCPU finds a function without any lock.
    start: AtomicU64,
    end: AtomicU64,
}

impl PciBus {
    /// A bus with the host bridge only.
    pub(crate) fn new() -> Arc<Self> {
        let bus = Self {
            devices: std::array::from_fn(|_| BusSlot::default()),
        };
        for slot in &bus.devices {
            slot.set_window(None);
        }
        *bus.devices[0].function.lock() = Some(Box::new(HostBridge(Configuration::new(HOST_BRIDGE))));
        Arc::new(bus)
    }

    /// Makes `function` device `device`. Returns `false` if there is a device already, or the number is too large.
    #[must_use]
    pub(crate) fn plug(&self, device: usize, function: Box<dyn Function>) -> bool {
        let Some(slot) = self.devices.get(device) else {
            return false;
        };
        let mut occupant = slot.function.lock();
        if occupant.is_some() {
            return false;
        }
        slot.set_window(function.window());
        *occupant = Some(function);
        true
    }

    /// Removes a device, if there is one, and waits for its workers to end. For the guest, it is gone immediately.
    pub(crate) fn unplug(&self, device: usize) {
        let Some(slot) = self.devices.get(device) else {
            return;
        };
        let function = {
            let mut occupant = slot.function.lock();
            slot.set_window(None);
            occupant.take()
        };
        // Drop it without the lock, so that a vCPU that accesses the slot does not wait for the device's workers.
        drop(function);
    }

    /// Whether there is no device with number `device`.
    pub(crate) fn is_empty(&self, device: usize) -> bool {
        self.devices
            .get(device)
            .is_none_or(|slot| slot.function.lock().is_none())
    }

    /// Reads configuration registers. A device that does not exist reads as all ones (PCI 3.0 §6.1).
    fn read_configuration(&self, address: ConfigurationAddress, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(slot) = self.slot(address)
            && let Some(function) = &mut *slot.function.lock()
        {
            function.read_configuration(address.offset, data);
        }
    }

    fn write_configuration(&self, address: ConfigurationAddress, data: &[u8]) {
        if let Some(slot) = self.slot(address)
            && let Some(function) = &mut *slot.function.lock()
        {
            function.write_configuration(address.offset, data);
            slot.set_window(function.window());
        }
    }

    fn slot(&self, address: ConfigurationAddress) -> Option<&BusSlot> {
        (address.bus == 0 && address.function == 0).then(|| &self.devices[address.device])
    }

    /// Calls `access` with the function whose window contains `address`, and the offset in that window.
    fn with_window(&self, address: u64, access: impl FnOnce(&mut dyn Function, u64)) {
        for slot in &self.devices {
            // Another vCPU may move the window between the two reads and after them, so check again under the lock.
            let (start, end) = (slot.start.load(Ordering::Acquire), slot.end.load(Ordering::Acquire));
            if (start..end).contains(&address)
                && let Some(function) = &mut *slot.function.lock()
                && let Some(window) = function.window()
                && window.contains(&address)
            {
                return access(&mut **function, address - window.start);
            }
        }
    }
}

impl BusSlot {
    fn set_window(&self, window: Option<Range<u64>>) {
        let Range { start, end } = window.unwrap_or(NO_WINDOW..NO_WINDOW);
        self.start.store(start, Ordering::Release);
        self.end.store(end, Ordering::Release);
    }
}

impl fmt::Debug for PciBus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let present = (0..DEVICE_COUNT).filter(|device| !self.is_empty(*device));
        formatter.debug_list().entries(present).finish()
    }
}

struct HostBridge(Configuration);

impl Function for HostBridge {
    fn read_configuration(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_configuration(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn window(&self) -> Option<Range<u64>> {
        None
    }

    fn read_window(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_window(&mut self, _offset: u64, _data: &[u8]) {}
}

/// The address of configuration registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ConfigurationAddress {
    bus: u8,
    /// Below [`DEVICE_COUNT`].
    device: usize,
    function: u8,
    offset: usize,
}

/// The configuration window of bus 0: 1 MiB, with 4 KiB for each function.
#[derive(Debug)]
pub(crate) struct ConfigurationWindow(pub(crate) Arc<PciBus>);

impl ConfigurationWindow {
    /// Bits 0 to 11 of the offset are the register, 12 to 14 the function, 15 to 19 the device.
    fn address(offset: u64) -> ConfigurationAddress {
        let bits = |from: u32, count: u32| usize::try_from(offset >> from & ((1 << count) - 1)).unwrap_or(0);
        ConfigurationAddress {
            bus: u8::try_from(offset >> 20).unwrap_or(u8::MAX),
            device: bits(15, 5),
            function: u8::try_from(bits(12, 3)).unwrap_or(u8::MAX),
            offset: bits(0, 12),
        }
    }
}

impl SharedRegisters for ConfigurationWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_configuration(Self::address(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_configuration(Self::address(offset), data);
    }
}

/// The memory window in which the windows of functions lie, from guest physical address `base` on.
#[derive(Debug)]
pub(crate) struct MemoryWindow {
    pub(crate) bus: Arc<PciBus>,
    pub(crate) base: u64,
}

impl SharedRegisters for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.bus.with_window(self.base + offset, |function, offset| {
            function.read_window(offset, data)
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.with_window(self.base + offset, |function, offset| {
            function.write_window(offset, data)
        });
    }
}

/// The I/O ports 0xCF8 to 0xCFF.
#[derive(Debug)]
pub(crate) struct ConfigurationPorts {
    bus: Arc<PciBus>,
    /// The address register.
    address: u32,
}

impl ConfigurationPorts {
    const ENABLE: u32 = 1 << 31;
    /// The offset of the data register.
    const DATA: u64 = 4;

    /// No register is selected yet.
    pub(crate) fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: 0 }
    }

    /// The configuration registers that byte `offset` of the data register stands for, if the mechanism is enabled.
    fn selected(&self, offset: u64) -> Option<ConfigurationAddress> {
        let bits = |from: u32, count: u32| (self.address >> from & ((1 << count) - 1)) as usize;
        let byte = usize::try_from(offset.checked_sub(Self::DATA)?).ok()?;
        (self.address & Self::ENABLE != 0).then(|| ConfigurationAddress {
            bus: u8::try_from(bits(16, 8)).unwrap_or(u8::MAX),
            device: bits(11, 5),
            function: u8::try_from(bits(8, 3)).unwrap_or(u8::MAX),
            offset: bits(2, 6) * 4 + byte,
        })
    }
}

impl Registers for ConfigurationPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(address) = self.selected(offset) {
            self.bus.read_configuration(address, data);
        } else if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = self.address.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(address) = self.selected(offset) {
            self.bus.write_configuration(address, data);
        } else if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            // Only a write of 32 bits reaches the address register.
            self.address = u32::from_le_bytes(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function whose window registers read as their offset.
    struct Echo(Configuration);

    impl Echo {
        fn new(base: u32) -> Box<Self> {
            let mut configuration = Configuration::new(Identity {
                vendor: 0x1af4,
                device: 0x1041,
                ..HOST_BRIDGE
            });
            configuration.set_window(base, 0x1000);
            Box::new(Self(configuration))
        }
    }

    impl Function for Echo {
        fn read_configuration(&mut self, offset: usize, data: &mut [u8]) {
            self.0.read(offset, data);
        }

        fn write_configuration(&mut self, offset: usize, data: &[u8]) {
            self.0.write(offset, data);
        }

        fn window(&self) -> Option<Range<u64>> {
            self.0.window()
        }

        fn read_window(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap_or(0));
        }

        fn write_window(&mut self, _offset: u64, _data: &[u8]) {}
    }

    fn read_ports(ports: &mut ConfigurationPorts, address: u32, byte: u64) -> u32 {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4 + byte, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_mechanisms_reach_the_same_devices_and_nothing_else() {
        let bus = PciBus::new();
        assert!(bus.plug(3, Echo::new(0xc000_0000)));
        assert!(!bus.plug(3, Echo::new(0xc000_1000)));
        assert!(!bus.plug(32, Echo::new(0xc000_1000)));
        let mut ports = ConfigurationPorts::new(bus.clone());
        let window = ConfigurationWindow(bus);
        for (bus, device, function, expected) in [
            (0, 0, 0, 0x0d57_8086),
            (0, 3, 0, 0x1041_1af4),
            (0, 3, 1, u32::MAX),
            (0, 4, 0, u32::MAX),
            (1, 3, 0, u32::MAX),
        ] {
            let address = 1 << 31 | bus << 16 | device << 11 | function << 8;
            assert_eq!(
                read_ports(&mut ports, address, 0),
                expected,
                "{bus}:{device}.{function}"
            );
            assert_eq!(read_ports(&mut ports, address & !(1 << 31), 0), u32::MAX, "disabled");
            let mut data = [0; 4];
            window.read(u64::from(bus << 20 | device << 15 | function << 12), &mut data);
            assert_eq!(u32::from_le_bytes(data), expected, "window {bus}:{device}.{function}");
        }
        let mut data = [0; 2];
        window.read(3 << 15 | 2, &mut data);
        assert_eq!(data, [0x41, 0x10]);
        window.read(3 << 15 | 0x100, &mut data);
        assert_eq!(data, [0, 0], "no extended capability");
        let mut byte = [0];
        ports.write(0, &(1_u32 << 31 | 3 << 11).to_le_bytes());
        ports.read(7, &mut byte);
        assert_eq!(byte, [0x10]);
    }

    #[test]
    fn window_that_moves_hides_no_other_window() {
        let bus = PciBus::new();
        for (device, base) in [(1, 0xc000_0000), (2, 0xc000_1000)] {
            assert!(bus.plug(device, Echo::new(base)));
            ConfigurationWindow(bus.clone()).write((device as u64) << 15 | 4, &[2, 0]);
        }
        let memory = MemoryWindow {
            bus: bus.clone(),
            base: 0xc000_0000,
        };
        // As another vCPU sees it while device 1 moves: the start is new, the end is old.
        bus.devices[1].start.store(0, Ordering::Release);
        bus.devices[1].end.store(u64::MAX, Ordering::Release);

        let mut data = [0];
        memory.read(0x1020, &mut data);

        assert_eq!(data, [0x20]);
    }

    #[test]
    fn window_is_found_where_the_guest_has_moved_it() {
        let bus = PciBus::new();
        assert!(bus.plug(1, Echo::new(0xc000_0000)));
        let memory = MemoryWindow {
            bus: bus.clone(),
            base: 0xc000_0000,
        };
        let configuration = ConfigurationWindow(bus.clone());
        let read = |address: u64| {
            let mut data = [0];
            memory.read(address - 0xc000_0000, &mut data);
            data[0]
        };
        assert_eq!(read(0xc000_0010), 0xff, "not enabled");
        configuration.write(1 << 15 | 4, &[2, 0]);
        assert_eq!(read(0xc000_0010), 0x10);
        configuration.write(1 << 15 | 0x10, &0xd000_0000_u32.to_le_bytes());
        assert_eq!(read(0xc000_0010), 0xff);
        assert_eq!(read(0xd000_0020), 0x20);

        bus.unplug(1);

        assert_eq!(read(0xd000_0020), 0xff);
        assert!(bus.is_empty(1));
        assert!(bus.plug(1, Echo::new(0xc000_0000)));
    }
}
