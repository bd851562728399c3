//! The configuration space of a function: 256 bytes, with the registers of a type 0 header (PCI 3.0 §6.1, §6.2).

use std::ops::Range;

/// The size of a configuration space in bytes. Reads beyond it, up to the 4096 bytes of PCI Express, return zero: there
/// are no extended capabilities.
pub(crate) const CONFIGURATION_SIZE: usize = 256;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The offset of the first capability: the end of the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Bits of the command register (PCI 3.0 §6.2.2).
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// The bit that disables INTx, in the high byte.
const COMMAND_INTX_DISABLE_HIGH: u8 = 1 << 2;
/// The status bit: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// The identity of a function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Base class, subclass and programming interface: 24 bits.
    pub(crate) class: u32,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// A configuration space: its bytes, and which bits of them the guest can write.
#[derive(Debug, Clone)]
pub(crate) struct Configuration {
    bytes: [u8; CONFIGURATION_SIZE],
    writable: [u8; CONFIGURATION_SIZE],
    /// The size of the window in bytes, a power of two; 0 if there is none.
    window_size: u32,
    /// The offset of the pointer to the next capability.
    last_pointer: usize,
    /// The end of the last capability.
    end: usize,
}

impl Configuration {
    /// A configuration space without window and capabilities.
    pub(crate) fn new(identity: Identity) -> Self {
        let mut this = Self {
            bytes: [0; CONFIGURATION_SIZE],
            writable: [0; CONFIGURATION_SIZE],
            window_size: 0,
            last_pointer: CAPABILITIES,
            end: FIRST_CAPABILITY,
        };
        this.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        this.set(DEVICE_ID, &identity.device.to_le_bytes());
        this.set(REVISION, &[identity.revision]);
        this.set(CLASS, &identity.class.to_le_bytes()[..3]);
        this.set(SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        this.set(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        // Scratch for software (PCI 3.0 §6.2.4). There is no interrupt pin: functions use MSI-X.
        this.writable[INTERRUPT_LINE] = 0xff;
        this.writable[COMMAND] = COMMAND_BUS_MASTER;
        this.writable[COMMAND + 1] = COMMAND_INTX_DISABLE_HIGH;
        this
    }

    /// Adds a window of `size` bytes, a power of two of at least 16, at guest physical address `base`. It is decoded
    /// when the guest sets the memory bit of the command register.
    pub(crate) fn set_window(&mut self, base: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
        self.window_size = size;
        // The low four bits are zero: memory, 32 bits wide, not prefetchable (PCI 3.0 §6.2.5.1).
        self.set(BAR_0, &base.to_le_bytes());
        self.writable[BAR_0..BAR_0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.writable[COMMAND] |= COMMAND_MEMORY;
    }

    /// Appends a capability: `id`, the pointer to the next capability, and `body`. The guest can write the bits of
    /// `body` that are set in `writable`. Returns the capability's offset.
    ///
    /// # Panics
    ///
    /// If the capabilities exceed the configuration space. Their sizes are constants, not input.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.end;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.last_pointer] = offset.to_le_bytes()[0];
        self.bytes[offset] = id;
        let start = offset + 2;
        self.set(start, body);
        self.writable[start..start + writable.len()].copy_from_slice(writable);
        self.last_pointer = offset + 1;
        self.end = (start + body.len()).next_multiple_of(4);
        offset
    }

    /// The decoded window: guest physical addresses. `None` if there is none, or the guest has not enabled it.
    pub(crate) fn window(&self) -> Option<Range<u64>> {
        if self.window_size == 0 || self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let base = u64::from(u32::from_le_bytes(self.array(BAR_0)));
        Some(base..base + u64::from(self.window_size))
    }

    /// Whether the guest lets the function access memory and interrupt (bus mastering).
    pub(crate) fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    /// Fills `data` with the bytes from `offset` on.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let available = self.bytes.get(offset..).unwrap_or_default();
        let length = available.len().min(data.len());
        data[..length].copy_from_slice(&available[..length]);
    }

    /// Writes the writable bits of `data` at `offset`.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        let target = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), new) in target.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// `N` bytes at `offset`.
    ///
    /// # Panics
    ///
    /// If they exceed the configuration space. `offset` comes from this program, never from the guest.
    pub(crate) fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes[offset..offset + N]);
        bytes
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration() -> Configuration {
        let mut configuration = Configuration::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x02_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        configuration.set_window(0xc000_0000, 0x8000);
        configuration
    }

    fn read_u32(configuration: &Configuration, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        configuration.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn window_has_its_size_and_moves_where_the_guest_writes() {
        let mut configuration = configuration();
        assert_eq!(configuration.window(), None, "before the guest enables it");

        configuration.write(BAR_0, &u32::MAX.to_le_bytes());
        assert_eq!(read_u32(&configuration, BAR_0), 0xffff_8000, "the size");
        configuration.write(BAR_0, &0xd000_1234_u32.to_le_bytes());
        configuration.write(COMMAND, &[COMMAND_MEMORY, 0]);

        assert_eq!(configuration.window(), Some(0xd000_0000..0xd000_8000));
        configuration.write(BAR_0, &0xffff_8000_u32.to_le_bytes());
        assert_eq!(configuration.window(), Some(0xffff_8000..0x1_0000_0000));
    }

    #[test]
    fn guest_changes_only_writable_bits() {
        let mut configuration = configuration();
        let capability = configuration.add_capability(9, &[1, 2, 3], &[0, 0x0f, 0]);

        for offset in (0..4096).step_by(4) {
            configuration.write(offset, &u32::MAX.to_le_bytes());
        }

        assert_eq!(read_u32(&configuration, VENDOR_ID), 0x1044_1af4);
        assert_eq!(read_u32(&configuration, REVISION), 0x0200_0001);
        assert_eq!(read_u32(&configuration, COMMAND), 0x0010_0406);
        assert_eq!(read_u32(&configuration, SUBSYSTEM_VENDOR_ID), 0x40_1af4);
        assert_eq!(read_u32(&configuration, 0x3c), 0xff);
        assert_eq!(configuration.array(capability), [9, 0, 1, 0x0f, 3]);
        for bar in 1..6 {
            assert_eq!(read_u32(&configuration, BAR_0 + 4 * bar), 0, "BAR {bar}");
        }
        assert_eq!(read_u32(&configuration, 256), 0);
        assert_eq!(read_u32(&configuration, 254) >> 16, 0);
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let mut configuration = configuration();
        let first = configuration.add_capability(0x11, &[0; 10], &[]);
        let second = configuration.add_capability(9, &[0; 13], &[]);
        let third = configuration.add_capability(9, &[0; 2], &[]);

        let next = |offset: usize| usize::from(configuration.array::<1>(offset)[0]);
        assert_eq!(next(CAPABILITIES), first);
        assert_eq!((next(first + 1), next(second + 1), next(third + 1)), (second, third, 0));
        assert!([first, second, third].iter().all(|offset| offset.is_multiple_of(4)));
    }
}
