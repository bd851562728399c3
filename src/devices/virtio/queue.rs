//! A virtqueue that a device owns: its size and ring addresses are fixed at activation, and it has a kick eventfd and
//! an interrupt.

use std::{
    io,
    num::Wrapping,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    buffers::{Chain, ChainError},
    interrupt::Interrupt,
};
use crate::{
    devices::counters::UsedChains,
    memory::{GuestMemory, MemoryRegions},
};

/// A queue that cannot continue. Its device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: {fault}")]
pub(crate) struct QueueError {
    /// The queue's index.
    pub(crate) queue: u16,
    #[source]
    pub(crate) fault: QueueFault,
}

/// Why a queue cannot continue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueFault {
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The available index is more than the queue's size ahead, or a ring cannot be accessed.
    #[error("the virtqueue is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A buffer is smaller than virtio requires. The value is its size in bytes.
    #[error("the driver provided a buffer of {0} bytes, which is too small")]
    BufferTooSmall(usize),
    #[error("cannot signal the eventfd of the virtqueue: {0}")]
    Kick(io::Error),
}

/// A virtqueue that its device owns from DRIVER_OK to reset.
pub(crate) struct DeviceQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: GuestMemory,
    /// The memory at activation, which contains the rings.
    rings: &'static MemoryRegions,
    interrupt: Arc<dyn Interrupt>,
    /// The used index at the last [`Self::notify_driver`].
    notified: Wrapping<u16>,
}

/// The size of flags and index before a ring's entries, in bytes (virtio 1.3 §2.7.6, §2.7.8).
const AVAIL_RING_HEADER_SIZE: u64 = 4;
const USED_RING_HEADER_SIZE: u64 = 4;

/// The offset of the index in the used ring, in bytes.
const USED_INDEX_OFFSET: u64 = 2;

/// The maximum number of chains that one [`DeviceQueue::serve`] call takes.
const MAX_CHAINS_PER_TURN: usize = 64;

/// VIRTQ_AVAIL_F_NO_INTERRUPT: the driver needs no interrupts.
const NO_INTERRUPT: u16 = 1;

/// The used ring of a queue, for a thread that does not serve the queue.
#[derive(Debug)]
struct UsedRing {
    rings: &'static MemoryRegions,
    used_index: GuestAddress,
    used_event: GuestAddress,
}

impl UsedChains for UsedRing {
    /// With VIRTIO_F_EVENT_IDX, a driver that waits for an interrupt has written to `used_event` up to which index it
    /// has taken chains (virtio 1.3 §2.7.7.1).
    fn untaken(&self) -> Option<(u16, u16)> {
        let load = |address| {
            self.rings
                .load::<u16>(address, Ordering::Relaxed)
                .ok()
                .map(u16::from_le)
        };
        let taken = load(self.used_event)?;
        Some((load(self.used_index)?.wrapping_sub(taken), taken))
    }
}

impl DeviceQueue {
    /// Wraps a queue that was validated against `memory`.
    pub(crate) fn new(
        index: u16,
        queue: Queue,
        kick: EventFd,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            notified: Wrapping(queue.next_used()),
            index,
            queue,
            kick,
            rings: memory.regions(),
            memory,
            interrupt,
        }
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// The eventfd that is signalled when the driver makes buffers available.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The size and the ring addresses, for a backend in another process.
    pub(crate) fn configuration(&self) -> &Queue {
        &self.queue
    }

    pub(crate) fn error(&self, fault: impl Into<QueueFault>) -> QueueError {
        QueueError {
            queue: self.index,
            fault: fault.into(),
        }
    }

    /// Which used chains the driver has taken, for a thread that does not serve the queue. `None` if the driver does not
    /// report it.
    pub(crate) fn used_chains(&self) -> Option<Box<dyn UsedChains>> {
        if !self.queue.event_idx_enabled() {
            return None;
        }
        let event = u64::from(self.queue.size()) * 2 + AVAIL_RING_HEADER_SIZE;
        Some(Box::new(UsedRing {
            rings: self.rings,
            // The addresses were validated at activation.
            used_index: ring_address(self.queue.used_ring(), USED_INDEX_OFFSET).ok()?,
            used_event: ring_address(self.queue.avail_ring(), event).ok()?,
        }))
    }

    /// Takes the next available chain.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain<'static>>, QueueError> {
        self.try_pop().map_err(|fault| self.error(fault))
    }

    fn try_pop(&mut self) -> Result<Option<Chain<'static>>, QueueFault> {
        if self.queue.avail_idx(self.rings, Ordering::Acquire)?.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // Read the regions after the available index: the chain's buffers may lie in memory that was added just
        // before the chain.
        let memory = self.memory.regions();
        // Without a chain the queue is broken: the entry of the ring cannot be read, or the driver has just moved the
        // available index back.
        let chain = self
            .queue
            .iter(memory)?
            .next()
            .ok_or(virtio_queue::Error::InvalidChain)?;
        Ok(Some(Chain::parse(chain, memory)?))
    }

    /// Passes each available chain to `process`, then returns the chain to the driver. `process` returns the number of
    /// bytes that it wrote to the chain. After [`MAX_CHAINS_PER_TURN`] chains, the queue kicks itself and the call
    /// returns, so that a guest that keeps adding chains cannot occupy a thread that serves other devices.
    pub(crate) fn serve(&mut self, mut process: impl FnMut(&mut Chain<'static>) -> u32) -> Result<(), QueueError> {
        for _ in 0..MAX_CHAINS_PER_TURN {
            if let Some(mut chain) = self.pop()? {
                let written = process(&mut chain);
                self.add_used(chain.head, written)?;
            } else {
                self.notify_driver()?;
                if !self.resume_kicks()? {
                    return Ok(());
                }
            }
        }
        self.kick_again()?;
        self.notify_driver()
    }

    /// Signals the kick, so that the queue is served again although the driver may not kick it.
    pub(crate) fn kick_again(&self) -> Result<(), QueueError> {
        self.kick.write(1).map_err(|error| self.error(QueueFault::Kick(error)))
    }

    /// Makes the chain that was popped last available again.
    pub(crate) fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, with `written` bytes in its writable buffers.
    pub(crate) fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let added = self.queue.add_used(self.rings, head, written);
        added.map_err(|error| self.error(error))
    }

    /// Returns several chains, given as head and number of written bytes. The driver sees all of them or none.
    pub(crate) fn add_used_batch(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), others)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for (head, written) in others {
            let offset = u64::from(next % self.queue.size()) * size_of::<u64>() as u64;
            let address = ring_address(self.queue.used_ring(), offset + USED_RING_HEADER_SIZE);
            let address = address.map_err(|fault| self.error(fault))?;
            // struct virtq_used_elem: head, then length, both little-endian.
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.rings
                .write_obj(element.to_le(), address)
                .map_err(|error| self.error(virtio_queue::Error::GuestMemory(error)))?;
            next = next.wrapping_add(1);
        }
        // Adding the last one moves the used index past all of them.
        self.queue.set_next_used(next);
        self.add_used(*head, *written)
    }

    /// Interrupts the driver if it has requested an interrupt for the chains that were used since the last call (virtio
    /// 1.3 §2.7.7.2).
    pub(crate) fn notify_driver(&mut self) -> Result<(), QueueError> {
        let used = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.notified, used);
        if used == before {
            return Ok(());
        }
        // The driver must see the used index before this thread reads whether the driver has requested an interrupt.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event = Wrapping(self.avail_field(u64::from(self.queue.size()) * 2 + AVAIL_RING_HEADER_SIZE)?);
            passes_event(before, used, event)
        } else {
            self.avail_field(0)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.notify_used(self.index);
        }
        Ok(())
    }

    /// Reads the 16-bit field of the available ring at `offset`.
    fn avail_field(&self, offset: u64) -> Result<u16, QueueError> {
        let address = ring_address(self.queue.avail_ring(), offset).map_err(|fault| self.error(fault))?;
        let field = self.rings.load::<u16>(address, Ordering::Relaxed);
        let field = field.map_err(|error| self.error(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u16::from_le(field))
    }

    /// Suppresses kicks while the queue is served.
    pub(crate) fn pause_kicks(&mut self) -> Result<(), QueueError> {
        let disabled = self.queue.disable_notification(self.rings);
        disabled.map_err(|error| self.error(error))
    }

    /// Enables kicks again. Returns `true` if chains have become available in the meantime: the caller must check the
    /// queue again, since there will be no kick for them.
    pub(crate) fn resume_kicks(&mut self) -> Result<bool, QueueError> {
        let enabled = self.queue.enable_notification(self.rings);
        enabled.map_err(|error| self.error(error))
    }
}

/// Whether the used index passes `event` when it moves from `before` to `used` (virtio 1.3 §2.7.7.2).
fn passes_event(before: Wrapping<u16>, used: Wrapping<u16>, event: Wrapping<u16>) -> bool {
    used - event - Wrapping(1) < used - before
}

fn ring_address(base: u64, offset: u64) -> Result<GuestAddress, QueueFault> {
    let address = base.checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
    Ok(GuestAddress(address))
}

impl std::fmt::Debug for DeviceQueue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("DeviceQueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsFd, unix::fs::FileExt},
        sync::atomic::Ordering,
    };

    use arbtest::arbtest;
    use virtio_queue::{desc::RawDescriptor, mock::MockSplitQueue};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::devices::virtio::mock::{INDIRECT, NEXT, WRITE, descriptor, device_queue, memory};

    fn parse_error(descriptors: &[RawDescriptor]) -> Option<QueueFault> {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        for (index, descriptor) in (0..).zip(descriptors) {
            mock.desc_table().store(index, *descriptor).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        queue.pop().err().map(|error| error.fault)
    }

    #[test]
    fn invalid_chains_are_refused_dragonball_a957054() {
        let cases = [
            (
                "descriptor that points to itself",
                vec![descriptor(0x8000, 16, NEXT, 0)],
                ChainError::Unterminated,
            ),
            (
                "loop of two descriptors",
                vec![descriptor(0x8000, 16, NEXT, 1), descriptor(0x8000, 16, NEXT, 0)],
                ChainError::Unterminated,
            ),
            (
                "next beyond the table",
                vec![descriptor(0x8000, 16, NEXT, 99)],
                ChainError::Unterminated,
            ),
            (
                "address beyond memory",
                vec![descriptor(0x10_0000, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "buffer crosses the end of memory",
                vec![descriptor(0xf_fff8, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "buffer wraps the address space",
                vec![descriptor(u64::MAX - 7, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "lengths whose sum wraps",
                vec![descriptor(0, 0x10_0000, NEXT, 1), descriptor(0, u32::MAX, 0, 0)],
                ChainError::Unterminated,
            ),
            (
                "readable buffer after a writable one",
                vec![descriptor(0x8000, 16, NEXT | WRITE, 1), descriptor(0x8000, 16, 0, 0)],
                ChainError::ReadableAfterWritable,
            ),
            (
                "indirect table whose length is not a multiple of a descriptor",
                vec![descriptor(0x8000, 17, INDIRECT, 0)],
                ChainError::Unterminated,
            ),
            (
                "indirect table outside of memory",
                vec![descriptor(0x10_0000, 32, INDIRECT, 0)],
                ChainError::Unterminated,
            ),
        ];
        for (name, descriptors, expected) in cases {
            match parse_error(&descriptors) {
                Some(QueueFault::Chain(error)) => assert_eq!(error, expected, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn available_index_beyond_the_queue_is_an_error() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        mock.avail().idx().store(17);
        let (mut queue, _) = device_queue(&mock, &memory);
        let error = queue.pop().unwrap_err();
        assert!(
            error.to_string().starts_with("queue 0: the virtqueue is broken"),
            "{error}"
        );
    }

    #[test]
    fn used_index_passes_each_event_between_its_values_and_no_other() {
        for before in [0, 1, 77, 0x7fff, 0x8000, 0xfff0, 0xffff] {
            for count in [0, 1, 2, 16, 256, 0x7fff, 0x8000] {
                let before = Wrapping::<u16>(before);
                for event in 0..=u16::MAX {
                    let distance = (Wrapping(event) - before).0;
                    let passes = passes_event(before, before + Wrapping(count), Wrapping(event));
                    assert_eq!(passes, distance < count, "{before} + {count}, event {event}");
                }
            }
        }
    }

    #[test]
    fn batch_of_used_chains_leaves_the_ring_as_single_ones_do() {
        let memory = memory();
        arbtest(|input| {
            let size = 1_u16 << input.int_in_range(0..=8)?;
            let start: u16 = input.arbitrary()?;
            let count = input.int_in_range(0..=usize::from(size))?;
            let chains = (0..count)
                .map(|_| input.arbitrary())
                .collect::<Result<Vec<(u16, u32)>, _>>()?;
            let mock = MockSplitQueue::new(&*memory, size);
            let used_by = |add: &dyn Fn(&mut DeviceQueue)| {
                let (mut queue, _) = device_queue(&mock, &memory);
                queue.queue.set_next_used(start);
                let address = GuestAddress(queue.queue.used_ring());
                let mut ring = vec![0; 4 + usize::from(size) * 8];
                memory.write_slice(&ring, address).unwrap();
                add(&mut queue);
                memory.read_slice(&mut ring, address).unwrap();
                (ring, queue.queue.next_used())
            };

            let single = used_by(&|queue| {
                for (head, written) in &chains {
                    queue.add_used(*head % size, *written).unwrap();
                }
            });
            let batch = used_by(&|queue| {
                let chains: Vec<_> = chains.iter().map(|(head, written)| (*head % size, *written)).collect();
                queue.add_used_batch(&chains).unwrap();
            });

            assert_eq!(single, batch);
            assert_eq!(usize::from(batch.1.wrapping_sub(start)), count);
            Ok(())
        })
        .size_max(4096)
        .budget_ms(500);
    }

    #[test]
    fn head_index_beyond_the_table_is_an_error() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        mock.avail().ring().ref_at(0).unwrap().store(400);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        assert!(queue.pop().is_err());
    }

    #[test]
    fn buffer_in_memory_added_after_activation_is_found() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        let (mut queue, _) = device_queue(&mock, &memory);
        assert!(queue.pop().unwrap().is_none());
        let base = memory.regions();
        let regions = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x20_0000), 0x10_0000)];
        let grown = MemoryRegions::from_ranges(&regions).unwrap();
        // The queue lies in the first region: copy its content.
        let mut content = vec![0; 0x10_0000];
        mock.desc_table().store(0, descriptor(0x20_0000, 16, 0, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        base.read_slice(&mut content, GuestAddress(0)).unwrap();
        grown.write_slice(&content, GuestAddress(0)).unwrap();

        memory.grow(grown);

        assert_eq!(queue.pop().unwrap().unwrap().readable.len(), 16);
    }

    /// Another monitor used such a buffer as one range of host memory.
    #[test]
    fn buffer_across_two_regions_is_used_as_two_parts_cve_2019_18960() {
        const SIZE: u64 = 1 << 20;
        let regions = [(GuestAddress(0), 1 << 20), (GuestAddress(SIZE), 1 << 20)];
        let is_split = |memory: &MemoryRegions| {
            let host = |address| memory.get_host_address(GuestAddress(address)).unwrap();
            host(SIZE - 1).wrapping_add(1) != host(SIZE)
        };
        let allocated: Vec<_> = (0..8).map(|_| MemoryRegions::from_ranges(&regions).unwrap()).collect();
        let split = allocated.into_iter().find(is_split);
        let memory = GuestMemory::new(split.expect("regions that are not contiguous on the host"));
        let mock = MockSplitQueue::new(&*memory, 16);
        let layout = [(SIZE - 5, 10, NEXT), (SIZE - 105, 110, WRITE)];
        for (index, (address, length, flags)) in (0..).zip(layout) {
            let entry = descriptor(address, length, flags, index + 1);
            mock.desc_table().store(index, entry).unwrap();
        }
        for head in 0..2 {
            mock.avail().ring().ref_at(head).unwrap().store(0);
        }
        mock.avail().idx().store(2);
        let (mut queue, _) = device_queue(&mock, &memory);
        let (source, sink) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[b's'; 110], 0).unwrap();

        // With copies, then with system calls.
        memory.write_slice(b"0123456789", GuestAddress(SIZE - 5)).unwrap();
        let mut chain = queue.pop().unwrap().unwrap();
        let mut taken = [0; 10];
        assert!(chain.readable.take(&mut taken));
        assert_eq!(chain.writable.put(&[b'p'; 120]), 110);
        let mut put = [0; 112];
        memory.read_slice(&mut put, GuestAddress(SIZE - 106)).unwrap();
        memory.write_slice(b"0123456789", GuestAddress(SIZE - 5)).unwrap();
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.readable.write_to(sink.as_fd(), Some(0)).unwrap(), 10);
        assert_eq!(chain.writable.read_from(source.as_fd(), Some(0)).unwrap(), 110);

        let (mut written, mut read) = ([0; 10], [0; 112]);
        sink.read_exact_at(&mut written, 0).unwrap();
        memory.read_slice(&mut read, GuestAddress(SIZE - 106)).unwrap();
        assert_eq!([&taken, &written], [b"0123456789"; 2]);
        for (received, byte) in [(put, b'p'), (read, b's')] {
            assert_eq!(received[1..111], [byte; 110]);
            assert_eq!((received[0], received[111]), (0, 0), "bytes beside the buffer");
        }
    }

    #[test]
    fn serve_returns_even_if_the_guest_keeps_adding_chains() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 128);
        for index in 0..128 {
            mock.desc_table().store(index, descriptor(0x8000, 16, 0, 0)).unwrap();
            mock.avail().ring().ref_at(index.into()).unwrap().store(index);
        }
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        let mut served = 0;

        let outcome = queue.serve(|_| {
            served += 1;
            mock.avail().idx().store(served + 1);
            0
        });

        outcome.unwrap();
        assert_eq!(usize::from(served), MAX_CHAINS_PER_TURN);
        assert_eq!(queue.kick().read().unwrap(), 1, "the queue kicked itself");
    }

    #[test]
    fn transfers_cross_buffer_boundaries() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        for (index, (address, length, flags)) in (0..).zip([
            (0x8000_u64, 3_u32, NEXT),
            (0x9000, 5, NEXT),
            (0xa000, 4, NEXT | WRITE),
            (0xb000, 6, WRITE),
        ]) {
            mock.desc_table()
                .store(index, descriptor(address, length, flags, index + 1))
                .unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        memory.write_slice(b"abc", GuestAddress(0x8000)).unwrap();
        memory.write_slice(b"defgh", GuestAddress(0x9000)).unwrap();
        let (mut queue, interrupts) = device_queue(&mock, &memory);

        let mut chain = queue.pop().unwrap().unwrap();
        let (mut first, mut second) = ([0; 4], [0; 4]);
        assert!(chain.readable.take(&mut first) && chain.readable.take(&mut second));
        assert!(!chain.readable.take(&mut [0]), "all bytes are consumed");
        assert_eq!(chain.writable.put(b"0123456789ab"), 10);
        queue.add_used(chain.head, 10).unwrap();
        queue.notify_driver().unwrap();

        assert_eq!((&first, &second), (b"abcd", b"efgh"));
        let mut written = [0; 6];
        memory.read_slice(&mut written, GuestAddress(0xb000)).unwrap();
        assert_eq!(&written, b"456789");
        assert_eq!(interrupts.used.load(Ordering::SeqCst), 1);
        assert!(queue.pop().unwrap().is_none());
    }
}
