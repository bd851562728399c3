//! The MMIO bus: which device answers at which guest physical address.

use std::{fmt, ops::Range};

use parking_lot::Mutex;

/// Registers that the guest reads and writes, called from vCPU threads.
pub(crate) trait Registers: Send {
    /// Fills `data` with what stands at `offset` from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Devices by address. Built before the first vCPU runs, immutable after.
#[derive(Default)]
pub(crate) struct Bus {
    devices: Vec<Window>,
}

struct Window {
    window: Range<u64>,
    device: Mutex<Box<dyn Registers>>,
}

impl Bus {
    /// Adds a device at `window`, which no other device's window overlaps.
    pub(crate) fn add(&mut self, window: Range<u64>, device: Box<dyn Registers>) {
        debug_assert!(
            self.devices
                .iter()
                .all(|other| window.end <= other.window.start || other.window.end <= window.start)
        );
        self.devices.push(Window {
            window,
            device: Mutex::new(device),
        });
    }

    /// A guest read. Reads of addresses without a device yield all ones, as on a real bus.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.with_device(address, |offset, device| device.read(offset, data));
    }

    /// A guest write. Writes to addresses without a device are dropped.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.with_device(address, |offset, device| device.write(offset, data));
    }

    fn with_device(&self, address: u64, access: impl FnOnce(u64, &mut dyn Registers)) {
        let found = self.devices.iter().find(|slot| slot.window.contains(&address));
        if let Some(Window { window, device }) = found {
            // A panic on another vCPU ends the process; the lock cannot be seen poisoned.
            let mut device = device.lock();
            access(address - window.start, &mut **device);
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_list()
            .entries(self.devices.iter().map(|slot| &slot.window))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as the offset.
    struct Echo;

    impl Registers for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn access_reaches_the_device_at_its_offset_and_no_other() {
        let mut bus = Bus::default();
        bus.add(0x1000..0x2000, Box::new(Echo));
        for (address, expected) in [(0x1000, 0), (0x1004, 4), (0x0fff, 0xff), (0x2000, 0xff)] {
            let mut data = [0];
            bus.read(address, &mut data);
            assert_eq!(data, [expected], "at {address:#x}");
        }
    }
}
