//! The layout of a device's window, and the capabilities in its configuration space that describe it (virtio 1.3
//! §4.1.4).

use std::ops::Range;

use crate::devices::pci::{
    configuration::Configuration,
    msix::{ENTRY_SIZE, MessageTable},
};

/// The size of a device's window in bytes. Its address is a multiple of it.
pub(crate) const WINDOW_SIZE: u32 = 0x1_0000;

/// The parts of the window. Each starts at a page boundary, so that a guest can map them separately.
pub(super) const COMMON: Range<u64> = 0..0x1000;
const INTERRUPT_STATUS: Range<u64> = 0x1000..0x2000;
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
/// Queue n is notified at n × [`NOTIFY_MULTIPLIER`].
pub(super) const NOTIFY: Range<u64> = 0x3000..0x5000;
/// Has room for all vectors of a function: 2048.
pub(super) const MESSAGE_TABLE: Range<u64> = 0x6000..0xe000;
pub(super) const PENDING_BITS: Range<u64> = 0xe000..0xf000;

/// The distance between the notification addresses of two queues, in bytes.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

const _: () = assert!(MESSAGE_TABLE.end - MESSAGE_TABLE.start == 2048 * ENTRY_SIZE);

/// The capability ID of a vendor, which virtio uses.
const VENDOR_SPECIFIC: u8 = 9;

/// Types of capabilities (virtio 1.3 §4.1.4, `cfg_type`).
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_INTERRUPT_STATUS: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// Offsets in a capability (`struct virtio_pci_cap`). The data follows in a capability of [`TYPE_PCI`].
const CAPABILITY_BAR: usize = 4;
const CAPABILITY_OFFSET: usize = 8;
const CAPABILITY_LENGTH: usize = 12;
const CAPABILITY_DATA: usize = 16;

/// The offsets of the capabilities that the transport reads, in the configuration space.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// MSI-X.
    pub(super) messages: usize,
    /// PCI configuration access: by it, a driver reaches the window through the configuration space.
    indirect: usize,
}

impl Layout {
    /// Adds all capabilities to `configuration`.
    pub(super) fn add_to(configuration: &mut Configuration, messages: &MessageTable) -> Self {
        let offset = |range: &Range<u64>| u32::try_from(range.start).unwrap_or(0);
        let layout = Self {
            messages: messages.add_capability(configuration, offset(&MESSAGE_TABLE), offset(&PENDING_BITS)),
            indirect: configuration.add_capability(
                VENDOR_SPECIFIC,
                &body(TYPE_PCI, &(0..0), &[0; 4]),
                // The guest writes the BAR, the offset, the length and the data.
                &[
                    0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                ][..],
            ),
        };
        for (kind, range) in [
            (TYPE_COMMON, COMMON),
            (TYPE_INTERRUPT_STATUS, INTERRUPT_STATUS),
            (TYPE_DEVICE, DEVICE),
        ] {
            configuration.add_capability(VENDOR_SPECIFIC, &body(kind, &range, &[]), &[]);
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        configuration.add_capability(VENDOR_SPECIFIC, &body(TYPE_NOTIFY, &NOTIFY, &multiplier), &[]);
        layout
    }

    /// Whether an access to `offset` touches the data of the PCI configuration access.
    pub(super) fn is_indirect_data(&self, offset: usize) -> bool {
        let start = self.indirect + CAPABILITY_DATA;
        (start..start + 4).contains(&offset)
    }

    /// The BAR, the offset and the length that the driver selected.
    pub(super) fn indirect_access(&self, configuration: &Configuration) -> (u8, u32, u32) {
        let [bar] = configuration.array(self.indirect + CAPABILITY_BAR);
        (
            bar,
            u32::from_le_bytes(configuration.array(self.indirect + CAPABILITY_OFFSET)),
            u32::from_le_bytes(configuration.array(self.indirect + CAPABILITY_LENGTH)),
        )
    }

    /// The data that the driver wrote.
    pub(super) fn indirect_data(&self, configuration: &Configuration) -> [u8; 4] {
        configuration.array(self.indirect + CAPABILITY_DATA)
    }

    /// Sets the data that the driver reads.
    pub(super) fn set_indirect_data(&self, configuration: &mut Configuration, data: [u8; 4]) {
        configuration.write(self.indirect + CAPABILITY_DATA, &data);
    }
}

/// The body of a capability of type `kind` for `range` of window 0 (`struct virtio_pci_cap` without its ID and next
/// pointer), followed by `more`.
fn body(kind: u8, range: &Range<u64>, more: &[u8]) -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    let length = u8::try_from(CAPABILITY_DATA + more.len()).unwrap_or(0);
    // Length, type, BAR, ID, two bytes of padding.
    let mut body = vec![length, kind, 0, 0, 0, 0];
    body.extend(word(range.start));
    body.extend(word(range.end - range.start));
    body.extend(more);
    body
}
