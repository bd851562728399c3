//! A queue as a device owns it: geometry fixed at activation, with its kick and its interrupt.

use std::{
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
    Interrupt,
    buffers::{Chain, ChainError},
};
use crate::memory::{GuestMemory, MemoryRegions};

/// Why a queue cannot go on; its device needs a reset.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// The driver made a chain available that the standard forbids.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The available ring claims more entries than it has, or the rings are gone.
    #[error("the virtqueue is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A buffer to fill that cannot hold what the standard says it must.
    #[error("the driver gave a buffer of {0} bytes, too small to be of use")]
    Small(usize),
}

/// A virtqueue that its device owns from DRIVER_OK to reset.
pub(crate) struct DeviceQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: GuestMemory,
    /// As it was at activation, which the rings lie in.
    rings: &'static MemoryRegions,
    interrupt: Arc<dyn Interrupt>,
    /// Up to here the driver was told of what was used, or did not want to be.
    announced: Wrapping<u16>,
}

/// Flags and index stand before a ring's entries (virtio 1.3 §2.7.6, §2.7.8).
const AVAIL_RING_HEADER: u64 = 4;
const USED_RING_HEADER: u64 = 4;

/// How many chains [`DeviceQueue::serve`] takes at a time.
const MAX_CHAINS_PER_TURN: usize = 64;

/// The driver needs no interrupts (VIRTQ_AVAIL_F_NO_INTERRUPT).
const NO_INTERRUPT: u16 = 1;

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
            announced: Wrapping(queue.next_used()),
            index,
            queue,
            kick,
            rings: memory.regions(),
            memory,
            interrupt,
        }
    }

    /// The eventfd that is signalled when the driver made buffers available.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The geometry, to hand to a backend in another process.
    pub(crate) fn geometry(&self) -> &Queue {
        &self.queue
    }

    /// Takes the next available chain.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain<'static>>, QueueError> {
        if self.queue.avail_idx(self.rings, Ordering::Acquire)?.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // After the chain was seen: its buffers may lie in memory that has come just before it.
        let memory = self.memory.regions();
        let Some(chain) = self.queue.iter(memory)?.next() else {
            return Ok(None);
        };
        Ok(Some(Chain::parse(chain, memory)?))
    }

    /// Gives each available chain to `answer`, which says how many bytes it wrote, and then back to the
    /// driver. After [`MAX_CHAINS_PER_TURN`] of them the queue kicks itself: a guest that has always one more may not keep
    /// a thread that has others to serve.
    pub(crate) fn serve(&mut self, mut answer: impl FnMut(&mut Chain<'static>) -> u32) -> Result<(), QueueError> {
        for _ in 0..MAX_CHAINS_PER_TURN {
            if let Some(mut chain) = self.pop()? {
                let written = answer(&mut chain);
                self.add_used(chain.head, written)?;
            } else {
                self.notify()?;
                if !self.resume_kicks()? {
                    return Ok(());
                }
            }
        }
        let _ = self.kick.write(1);
        self.notify()
    }

    /// Puts the chain that was just popped back.
    pub(crate) fn push_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `written` bytes in its writable buffers.
    pub(crate) fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(self.rings, head, written)?)
    }

    /// Gives several chains back, of which the driver sees all or none.
    pub(crate) fn add_used_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), others)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for (head, written) in others {
            let place = u64::from(next % self.queue.size()) * size_of::<u64>() as u64;
            let address = self.ring(self.queue.used_ring(), place + USED_RING_HEADER)?;
            // The chain's head, then the length, in little-endian order.
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.rings
                .write_obj(element.to_le(), address)
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        // The last one moves the ring's index past all of them.
        self.queue.set_next_used(next);
        self.add_used(*head, *written)
    }

    /// Interrupts the driver if it asked to be for what was used since the last call (virtio 1.3
    /// §2.7.7.2).
    pub(crate) fn notify(&mut self) -> Result<(), QueueError> {
        let used = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return Ok(());
        }
        // What was used must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event = Wrapping(self.avail(u64::from(self.queue.size()) * 2 + AVAIL_RING_HEADER)?);
            used - event - Wrapping(1) < used - before
        } else {
            self.avail(0)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used(self.index);
        }
        Ok(())
    }

    /// The field of the available ring at `offset`.
    fn avail(&self, offset: u64) -> Result<u16, QueueError> {
        let address = self.ring(self.queue.avail_ring(), offset)?;
        let field = self.rings.load::<u16>(address, Ordering::Relaxed);
        Ok(u16::from_le(field.map_err(virtio_queue::Error::GuestMemory)?))
    }

    fn ring(&self, base: u64, offset: u64) -> Result<GuestAddress, QueueError> {
        let address = base.checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
        Ok(GuestAddress(address))
    }

    /// Asks the driver not to kick while the queue is being worked on.
    pub(crate) fn pause_kicks(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(self.rings)?)
    }

    /// Asks for kicks again; `true` if buffers came meanwhile and the caller must look once more.
    pub(crate) fn resume_kicks(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(self.rings)?)
    }
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
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Descriptor flags (virtio 1.3 §2.7.5), whose constants are wider than the field.
    pub(crate) const NEXT: u16 = 1;
    pub(crate) const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// An interrupt that counts.
    #[derive(Debug, Default)]
    pub(crate) struct Count {
        pub(crate) used: AtomicUsize,
        pub(crate) config: AtomicUsize,
    }

    impl Interrupt for Count {
        fn used(&self, _index: u16) {
            self.used.fetch_add(1, Ordering::SeqCst);
        }

        fn config_changed(&self) {
            self.config.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// 1 MiB of guest memory.
    pub(crate) fn memory() -> GuestMemory {
        GuestMemory::new(MemoryRegions::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
    }

    /// The device's side of a mock queue.
    pub(crate) fn device_queue(
        mock: &MockSplitQueue<'_, MemoryRegions>,
        memory: &GuestMemory,
    ) -> (DeviceQueue, Arc<Count>) {
        let count = Arc::new(Count::default());
        let queue: Queue = mock.create_queue().unwrap();
        let kick = EventFd::new(0).unwrap();
        (DeviceQueue::new(0, queue, kick, memory.clone(), count.clone()), count)
    }

    pub(crate) fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, length, flags, next))
    }

    fn parse_error(descriptors: &[RawDescriptor]) -> Option<QueueError> {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        for (index, descriptor) in (0..).zip(descriptors) {
            mock.desc_table().store(index, *descriptor).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let (mut queue, _) = device_queue(&mock, &memory);
        queue.pop().err()
    }

    #[test]
    fn hostile_chains_are_refused() {
        let cases = [
            (
                "loop to itself",
                vec![descriptor(0x8000, 16, NEXT, 0)],
                ChainError::Endless,
            ),
            (
                "loop of two",
                vec![descriptor(0x8000, 16, NEXT, 1), descriptor(0x8000, 16, NEXT, 0)],
                ChainError::Endless,
            ),
            (
                "next beyond the table",
                vec![descriptor(0x8000, 16, NEXT, 99)],
                ChainError::Endless,
            ),
            (
                "address beyond memory",
                vec![descriptor(0x10_0000, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "crosses the end of memory",
                vec![descriptor(0xf_fff8, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "wraps the address space",
                vec![descriptor(u64::MAX - 7, 16, 0, 0)],
                ChainError::OutOfRange,
            ),
            (
                "lengths whose sum wraps",
                vec![descriptor(0, 0x10_0000, NEXT, 1), descriptor(0, u32::MAX, 0, 0)],
                ChainError::Endless,
            ),
            (
                "readable behind writable",
                vec![descriptor(0x8000, 16, NEXT | WRITE, 1), descriptor(0x8000, 16, 0, 0)],
                ChainError::Order,
            ),
            (
                "indirect table of a broken length",
                vec![descriptor(0x8000, 17, INDIRECT, 0)],
                ChainError::Endless,
            ),
            (
                "indirect table outside of memory",
                vec![descriptor(0x10_0000, 32, INDIRECT, 0)],
                ChainError::Endless,
            ),
        ];
        for (name, descriptors, expected) in cases {
            match parse_error(&descriptors) {
                Some(QueueError::Chain(error)) => assert_eq!(error, expected, "{name}"),
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
        assert!(matches!(queue.pop(), Err(QueueError::Ring(_))));
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
    fn buffer_in_memory_that_came_meanwhile_is_found() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        let (mut queue, _) = device_queue(&mock, &memory);
        assert!(queue.pop().unwrap().is_none());
        let base = memory.regions();
        let regions = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x20_0000), 0x10_0000)];
        let grown = MemoryRegions::from_ranges(&regions).unwrap();
        // The test's queue lies in the first region, whose content comes along.
        let mut content = vec![0; 0x10_0000];
        mock.desc_table().store(0, descriptor(0x20_0000, 16, 0, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        base.read_slice(&mut content, GuestAddress(0)).unwrap();
        grown.write_slice(&content, GuestAddress(0)).unwrap();

        memory.grow(grown);

        assert_eq!(queue.pop().unwrap().unwrap().readable.len(), 16);
    }

    #[test]
    fn guest_that_has_always_one_more_does_not_keep_the_thread() {
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
        assert_eq!(queue.kick().read().unwrap(), 1, "it comes back by itself");
    }

    #[test]
    fn bytes_cross_buffers_of_any_split() {
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
        let (mut queue, count) = device_queue(&mock, &memory);

        let mut chain = queue.pop().unwrap().unwrap();
        let (mut start, mut rest) = ([0; 4], [0; 4]);
        assert!(chain.readable.take(&mut start) && chain.readable.take(&mut rest));
        assert!(!chain.readable.take(&mut [0]), "nothing is left");
        assert_eq!(chain.writable.put(b"0123456789ab"), 10);
        queue.add_used(chain.head, 10).unwrap();
        queue.notify().unwrap();

        assert_eq!((&start, &rest), (b"abcd", b"efgh"));
        let mut written = [0; 6];
        memory.read_slice(&mut written, GuestAddress(0xb000)).unwrap();
        assert_eq!(&written, b"456789");
        assert_eq!(count.used.load(Ordering::SeqCst), 1);
        assert!(queue.pop().unwrap().is_none());
    }
}
