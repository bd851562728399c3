//! A bus: maps the addresses of a guest's accesses to devices. A machine has one for guest physical addresses and one
//! for I/O ports.

use std::{fmt, ops::Range, sync::Arc};

use parking_lot::Mutex;

/// The registers of a device. vCPU threads call these methods, one at a time. An access has 1, 2, 4 or 8 bytes; if the
/// guest repeats an access to a port (`rep outsb`), `data` has all of its bytes.
pub(crate) trait Registers: Send {
    /// Fills `data` with the registers at `offset` from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the registers at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// The registers of several devices, which vCPU threads use at the same time.
pub(crate) trait SharedRegisters: Send + Sync {
    /// Like [`Registers::read`].
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Like [`Registers::write`].
    fn write(&self, offset: u64, data: &[u8]);
}

/// The devices on the bus, by address. All are added before the first vCPU runs, and none is removed.
#[derive(Default)]
pub(crate) struct Bus {
    windows: Vec<Window>,
}

struct Window {
    range: Range<u64>,
    device: Occupant,
}

enum Occupant {
    One(Mutex<Box<dyn Registers>>),
    Several(Arc<dyn SharedRegisters>),
}

impl Bus {
    /// Adds a device at `range`, which must not overlap another device's range.
    pub(crate) fn add(&mut self, range: Range<u64>, device: Box<dyn Registers>) {
        self.add_occupant(range, Occupant::One(Mutex::new(device)));
    }

    /// Adds several devices at `range`, which must not overlap another device's range.
    pub(crate) fn add_shared(&mut self, range: Range<u64>, devices: Arc<dyn SharedRegisters>) {
        self.add_occupant(range, Occupant::Several(devices));
    }

    fn add_occupant(&mut self, range: Range<u64>, device: Occupant) {
        debug_assert!(
            self.windows
                .iter()
                .all(|other| range.end <= other.range.start || other.range.end <= range.start)
        );
        self.windows.push(Window { range, device });
    }

    /// Handles a read by the guest. An address without a device reads as all ones, as on a real bus.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((window, offset)) = self.find(address) {
            match &window.device {
                Occupant::One(device) => device.lock().read(offset, data),
                Occupant::Several(devices) => devices.read(offset, data),
            }
        }
    }

    /// Handles a write by the guest. A write to an address without a device is dropped.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.find(address) {
            match &window.device {
                Occupant::One(device) => device.lock().write(offset, data),
                Occupant::Several(devices) => devices.write(offset, data),
            }
        }
    }

    fn find(&self, address: u64) -> Option<(&Window, u64)> {
        let window = self.windows.iter().find(|window| window.range.contains(&address))?;
        Some((window, address - window.range.start))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_list()
            .entries(self.windows.iter().map(|window| &window.range))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each register reads as its offset.
    struct Echo;

    impl Registers for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn access_reaches_the_device_whose_range_contains_the_address() {
        let mut bus = Bus::default();
        bus.add(0x1000..0x2000, Box::new(Echo));
        for (address, expected) in [(0x1000, 0), (0x1004, 4), (0x0fff, 0xff), (0x2000, 0xff)] {
            let mut data = [0];
            bus.read(address, &mut data);
            assert_eq!(data, [expected], "at {address:#x}");
        }
    }
}
