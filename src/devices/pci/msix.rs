//! MSI-X (PCI 3.0 §6.8.2): a table of messages, by which a function interrupts the guest's processors.
//!
//! A function signals the eventfd of a vector, whether or not the vector is masked. While a vector is
//! masked, its eventfd is not connected to the guest and keeps the signal: that is the pending bit of the vector.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use super::configuration::Configuration;

/// The size of a table entry in bytes.
pub(crate) const ENTRY_SIZE: u64 = 16;

/// The maximum number of vectors (PCI 3.0 §6.8.2.3).
pub(crate) const MAX_VECTORS: u16 = 2048;

const CAPABILITY_ID: u8 = 0x11;
/// The offset of the message control register in the capability.
const MESSAGE_CONTROL: usize = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// The mask bit of the vector control field.
const VECTOR_MASKED: u32 = 1;

/// A message: the write, address and data, by which a function interrupts a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The connection of one vector to the guest. The vmm implements it with a route and an irqfd of KVM. Dropping it
/// disconnects the vector.
pub(crate) trait MessageVector: Send {
    /// Sends `message` to the guest whenever the eventfd is signalled. A signal from before the call is sent at once.
    ///
    /// # Errors
    ///
    /// The vector is disconnected then.
    fn connect(&mut self, message: Message) -> io::Result<()>;

    /// Keeps signals in the eventfd from now on.
    fn disconnect(&mut self) -> io::Result<()>;

    /// The eventfd by which the device interrupts. Reading it does not block.
    fn event(&self) -> &EventFd;
}

/// The MSI-X state of a function.
pub(crate) struct MessageTable {
    /// The name of the device in the log.
    name: String,
    entries: Vec<Entry>,
    /// The message control register, as the guest set it.
    control: u16,
}

struct Entry {
    message: Message,
    masked: bool,
    vector: Box<dyn MessageVector>,
    connected: Option<Message>,
}

impl MessageTable {
    /// The table of a function with `vectors`, at least one and at most [`MAX_VECTORS`]. All are masked.
    pub(crate) fn new(name: String, vectors: Vec<Box<dyn MessageVector>>) -> Self {
        debug_assert!((1..=usize::from(MAX_VECTORS)).contains(&vectors.len()));
        let entries = vectors.into_iter().map(|vector| Entry {
            message: Message::default(),
            masked: true,
            vector,
            connected: None,
        });
        Self {
            name,
            entries: entries.collect(),
            control: 0,
        }
    }

    /// Adds the capability to `configuration`. The table and the pending bits lie at these offsets in window 0,
    /// multiples of 8. Returns the capability's offset.
    pub(crate) fn add_capability(
        &self,
        configuration: &mut Configuration,
        table_offset: u32,
        pending_offset: u32,
    ) -> usize {
        let last = u16::try_from(self.entries.len() - 1).unwrap_or(MAX_VECTORS - 1);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&table_offset.to_le_bytes());
        body[6..].copy_from_slice(&pending_offset.to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        configuration.add_capability(CAPABILITY_ID, &body, &writable)
    }

    /// Applies the message control register of the capability at `capability`, after the guest may have written it.
    pub(crate) fn update_control(&mut self, configuration: &Configuration, capability: usize) {
        let control = u16::from_le_bytes(configuration.array(capability + MESSAGE_CONTROL));
        if control != self.control {
            self.control = control;
            for index in 0..self.entries.len() {
                self.apply(index);
            }
        }
    }

    /// The eventfd of each vector.
    pub(crate) fn events(&self) -> io::Result<Vec<EventFd>> {
        self.entries
            .iter()
            .map(|entry| entry.vector.event().try_clone())
            .collect()
    }

    /// Fills `data` from the table at `offset`. Accesses have 32 or 64 bits and are aligned (PCI 3.0 §6.8.2).
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let words = data.chunks_exact_mut(4).zip((offset..).step_by(4));
        for (word, offset) in words {
            word.copy_from_slice(&self.read_word(offset).to_le_bytes());
        }
    }

    /// Writes `data` to the table at `offset`.
    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8]) {
        for (word, offset) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            let Ok(word) = word.try_into() else { continue };
            self.write_word(offset, u32::from_le_bytes(word));
        }
    }

    /// Fills `data` from the pending bits at `offset`.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| self.is_pending(first.saturating_add(*bit)))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// Clears the pending bits, as a reset of the device does.
    pub(crate) fn clear_pending(&mut self) {
        for entry in self.entries.iter().filter(|entry| entry.connected.is_none()) {
            // Fails only if nothing is pending.
            let _ = entry.vector.event().read();
        }
    }

    fn is_pending(&self, index: usize) -> bool {
        self.entries
            .get(index)
            .is_some_and(|entry| entry.connected.is_none() && is_readable(entry.vector.event()))
    }

    fn read_word(&self, offset: u64) -> u32 {
        let Some(entry) = self.entries.get(index_of(offset)) else {
            return 0;
        };
        match offset % ENTRY_SIZE {
            0 => (entry.message.address & 0xffff_ffff) as u32,
            4 => (entry.message.address >> 32) as u32,
            8 => entry.message.data,
            12 if entry.masked => VECTOR_MASKED,
            _ => 0,
        }
    }

    fn write_word(&mut self, offset: u64, value: u32) {
        let index = index_of(offset);
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let address = &mut entry.message.address;
        match offset % ENTRY_SIZE {
            // The message's address is a multiple of 4.
            0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
            4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.message.data = value,
            12 => entry.masked = value & VECTOR_MASKED != 0,
            _ => return,
        }
        self.apply(index);
    }

    /// Connects or disconnects vector `index` according to its entry and the message control register.
    fn apply(&mut self, index: usize) {
        let is_enabled = self.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let wanted = (is_enabled && !entry.masked).then_some(entry.message);
        if wanted == entry.connected {
            return;
        }
        let result = match wanted {
            Some(message) => entry.vector.connect(message),
            None => entry.vector.disconnect(),
        };
        entry.connected = wanted;
        if let Err(error) = result {
            entry.connected = None;
            log::warn!(target: &self.name, "cannot change the route of interrupt vector {index}: {error}");
        }
    }
}

impl std::fmt::Debug for MessageTable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_list()
            .entries(self.entries.iter().map(|entry| entry.connected))
            .finish()
    }
}

fn index_of(offset: u64) -> usize {
    usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX)
}

fn is_readable(event: &EventFd) -> bool {
    use std::os::fd::{AsRawFd, BorrowedFd};

    // SAFETY: the eventfd is open for as long as it is borrowed.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut polled = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // An eventfd can always be polled.
    poll(&mut polled, Some(&now)).is_ok_and(|ready| ready == 1)
}

#[cfg(test)]
pub(crate) mod mock {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// A vector that records the message to which it is connected.
    pub(crate) struct MockVector {
        event: EventFd,
        connected: Arc<Mutex<Option<Message>>>,
    }

    impl MockVector {
        /// Returns a vector, and the message to which it is connected.
        pub(crate) fn pair() -> (Box<dyn MessageVector>, Arc<Mutex<Option<Message>>>) {
            let connected = Arc::new(Mutex::new(None));
            let vector = Self {
                event: EventFd::new(EFD_NONBLOCK).unwrap(),
                connected: connected.clone(),
            };
            (Box::new(vector), connected)
        }
    }

    impl MessageVector for MockVector {
        fn connect(&mut self, message: Message) -> io::Result<()> {
            *self.connected.lock() = Some(message);
            Ok(())
        }

        fn disconnect(&mut self) -> io::Result<()> {
            *self.connected.lock() = None;
            Ok(())
        }

        fn event(&self) -> &EventFd {
            &self.event
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::{mock::MockVector, *};
    use crate::devices::pci::configuration::Identity;

    const MESSAGE: Message = Message {
        address: 0xfee0_1000,
        data: 0x41,
    };

    struct Fixture {
        table: MessageTable,
        configuration: Configuration,
        capability: usize,
        connected: Vec<Arc<Mutex<Option<Message>>>>,
    }

    impl Fixture {
        fn new(count: usize) -> Self {
            let (vectors, connected) = (0..count).map(|_| MockVector::pair()).unzip();
            let table = MessageTable::new("test".to_owned(), vectors);
            let mut configuration = Configuration::new(Identity {
                vendor: 1,
                device: 1,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            let capability = table.add_capability(&mut configuration, 0x4000, 0x5000);
            Self {
                table,
                configuration,
                capability,
                connected,
            }
        }

        fn set_control(&mut self, control: u16) {
            self.configuration
                .write(self.capability + MESSAGE_CONTROL, &control.to_le_bytes());
            self.table.update_control(&self.configuration, self.capability);
        }

        /// Writes [`MESSAGE`] to entry `index` and unmasks it.
        fn program(&mut self, index: u64) {
            let base = index * ENTRY_SIZE;
            self.table.write_table(base, &MESSAGE.address.to_le_bytes());
            self.table.write_table(base + 8, &MESSAGE.data.to_le_bytes());
            self.table.write_table(base + 12, &0_u32.to_le_bytes());
        }

        fn pending(&self) -> u8 {
            let mut bits = [0xff];
            self.table.read_pending(0, &mut bits);
            bits[0]
        }
    }

    #[test]
    fn vector_is_connected_only_while_nothing_masks_it() {
        let mut fixture = Fixture::new(2);
        fixture.program(1);
        let connected = fixture.connected.clone();
        let check = |expected, text| assert_eq!(*connected[1].lock(), expected, "{text}");
        check(None, "MSI-X is disabled");
        fixture.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        check(None, "the function is masked");
        fixture.set_control(CONTROL_ENABLE);
        check(Some(MESSAGE), "enabled");
        assert_eq!(*fixture.connected[0].lock(), None, "the other vector is masked");
        fixture.table.write_table(ENTRY_SIZE + 12, &1_u32.to_le_bytes());
        check(None, "the vector is masked");
        fixture.table.write_table(ENTRY_SIZE + 8, &0x42_u32.to_le_bytes());
        fixture.table.write_table(ENTRY_SIZE + 12, &0_u32.to_le_bytes());
        check(Some(Message { data: 0x42, ..MESSAGE }), "another message");
        fixture.set_control(0);
        check(None, "disabled again");
    }

    #[test]
    fn signal_of_a_masked_vector_is_pending_until_it_is_unmasked_or_reset() {
        let mut fixture = Fixture::new(3);
        fixture.set_control(CONTROL_ENABLE);
        assert_eq!(fixture.pending(), 0);

        fixture.table.events().unwrap()[2].write(1).unwrap();
        assert_eq!(fixture.pending(), 0b100);
        fixture.program(2);
        assert_eq!(fixture.pending(), 0, "KVM delivers it");
        fixture.table.write_table(2 * ENTRY_SIZE + 12, &1_u32.to_le_bytes());
        assert_eq!(fixture.pending(), 0b100);
        fixture.table.clear_pending();
        assert_eq!(fixture.pending(), 0);
    }

    #[test]
    fn table_reads_back_what_was_written_and_ignores_other_offsets() {
        let mut fixture = Fixture::new(2);
        fixture.program(1);
        let mut data = [0xff; 8];
        fixture.table.read_table(ENTRY_SIZE, &mut data);
        assert_eq!(u64::from_le_bytes(data), MESSAGE.address);
        fixture.table.read_table(ENTRY_SIZE + 8, &mut data);
        assert_eq!(data, [0x41, 0, 0, 0, 0, 0, 0, 0]);
        fixture.table.read_table(12, &mut data[..4]);
        assert_eq!(data[..4], [1, 0, 0, 0], "masked after reset");
        for (offset, length) in [(2 * ENTRY_SIZE, 8), (0x7ff8, 8), (3, 4), (0, 2), (5, 8)] {
            fixture.table.write_table(offset, &[0xff; 8][..length]);
        }
        fixture.table.read_table(2 * ENTRY_SIZE, &mut data);
        assert_eq!(data, [0; 8]);
        let mut bits = [0xff; 2];
        fixture.table.read_pending(0xffe, &mut bits);
        assert_eq!(bits, [0, 0]);
    }

    #[test]
    fn capability_has_the_number_of_vectors_and_the_places_of_the_tables() {
        let fixture = Fixture::new(3);
        let capability = fixture.configuration.array(fixture.capability);
        assert_eq!(capability, [0x11, 0, 2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    }
}
