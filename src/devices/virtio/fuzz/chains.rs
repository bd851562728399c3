//! Descriptor chains and used rings, compared with a second implementation.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arbitrary::{Result, Unstructured};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{ADDED, Buffer, Guest, HIGH, INDIRECT, LOW, NEXT, PLUGGABLE, Ring, WRITE};
use crate::devices::virtio::{
    buffers::{Buffers, Chain},
    interrupt::Interrupt,
    queue::DeviceQueue,
};

const MAX_STEPS: usize = 200;

/// The maximum number of buffers in one direction, where a buffer in several regions counts for each.
const MAX_BUFFERS: usize = 1024;

/// The maximum numbers of bytes of a chain that are read and written, and compared.
const MAX_READ: usize = 0x2000;
const MAX_WRITTEN: usize = 200;

#[derive(Debug, Default)]
struct UsedInterrupts(AtomicUsize);

impl Interrupt for UsedInterrupts {
    fn notify_used(&self, queue_index: u16) {
        assert_eq!(queue_index, 0);
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn notify_config_change(&self) {}

    fn delegate(&self, _queue_index: u16) -> std::io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// What a chain consists of, as a device must see it: address and length of each buffer that is not empty.
#[derive(Debug, Default, PartialEq, Eq)]
struct Expected {
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

/// Interprets `data` as a driver that writes descriptors and rings, and a device that takes chains and returns them.
///
/// # Panics
///
/// If a chain, its bytes, the used ring or the interrupts are not those of the specification.
pub fn parse_chains(data: &[u8]) {
    // The input may end anywhere.
    let _ = run(&mut Unstructured::new(data));
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let mut guest = Guest::new();
    let base = *input.choose(&[LOW.start, HIGH.start, LOW.start + 0x1000])?;
    let mut ring = Ring::new(base, *input.choose(&[1, 2, 4, 16])?);
    let interrupts = Arc::new(UsedInterrupts::default());
    let start = if input.arbitrary()? {
        0
    } else {
        u16::MAX - u16::from(input.arbitrary::<u8>()? & 0x1f)
    };
    let event_index: bool = input.arbitrary()?;
    ring.available = start;
    ring.write_available_index(&guest);
    let mut device = Device {
        queue: device_queue(&ring, &guest, start, event_index, interrupts.clone()),
        next: start,
        used: start,
        notified: start,
        taken: Vec::new(),
        event_index,
    };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        match input.int_in_range(0..=9_u8)? {
            0..=2 => offer(&mut ring, &mut guest, input)?,
            3 | 4 => ring.damage(&mut guest, input)?,
            5 => guest.grow(),
            6 => device.return_chains(&ring, &guest, input.int_in_range(0..=3)?),
            7 => device.notify(&ring, &guest, &interrupts),
            _ => {
                if !device.take(&ring, &guest, input)? {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn device_queue(
    ring: &Ring,
    guest: &Guest,
    start: u16,
    event_index: bool,
    interrupt: Arc<dyn Interrupt>,
) -> DeviceQueue {
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(ring.size);
    queue.try_set_desc_table_address(GuestAddress(ring.base)).unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(ring.available_ring()))
        .unwrap();
    queue.try_set_used_ring_address(GuestAddress(ring.used_ring())).unwrap();
    queue.set_event_idx(event_index);
    queue.set_next_avail(start);
    queue.set_next_used(start);
    queue.set_ready(true);
    assert!(queue.is_valid(&*guest.memory));
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    DeviceQueue::new(0, queue, kick, guest.memory.clone(), interrupt)
}

/// Makes a chain with up to 20 buffers available.
fn offer(ring: &mut Ring, guest: &mut Guest, input: &mut Unstructured<'_>) -> Result<()> {
    let mut buffers = Vec::new();
    let mut can_read = true;
    for _ in 0..input.int_in_range(0..=20_u8)? {
        can_read &= input.ratio(5_u8, 6)?;
        let length = match input.int_in_range(0..=7_u8)? {
            0 => input.arbitrary()?,
            1 => u32::from(input.arbitrary::<u16>()?),
            _ => u32::from(input.arbitrary::<u8>()?),
        };
        buffers.push(Buffer {
            address: guest.place(input, length)?,
            length,
            flags: if can_read { 0 } else { WRITE },
        });
    }
    let indirect = if input.arbitrary()? {
        Some(guest.place(input, u32::try_from(buffers.len()).unwrap() * 16)?)
    } else {
        None
    };
    if buffers.is_empty() {
        ring.make_available(guest, 0);
    } else {
        ring.offer(guest, &buffers, indirect);
    }
    Ok(())
}

/// The device, and what is known about it.
struct Device {
    queue: DeviceQueue,
    /// The available index of the next chain.
    next: u16,
    used: u16,
    notified: u16,
    /// The heads of the chains that were not returned.
    taken: Vec<u16>,
    event_index: bool,
}

impl Device {
    /// Takes the next chain and compares it. Returns `false` if the queue is broken.
    fn take(&mut self, ring: &Ring, guest: &Guest, input: &mut Unstructured<'_>) -> Result<bool> {
        // A chain may contain the ring, so the driver need not have written this index.
        let available = guest.read(ring.available_ring() + 2, 2).unwrap();
        let ahead = u16::from_le_bytes([available[0], available[1]]).wrapping_sub(self.next);
        let slot = u64::from(self.next % ring.size);
        let head = guest.read(ring.available_ring() + 4 + 2 * slot, 2).unwrap();
        let head = u16::from_le_bytes([head[0], head[1]]);
        let expected = (ahead <= ring.size).then(|| walk(guest, ring, head)).flatten();
        let chain = match self.queue.pop() {
            Ok(None) => {
                assert_eq!(ahead, 0);
                return Ok(true);
            }
            Ok(Some(chain)) => chain,
            Err(error) => {
                assert!(expected.is_none() && ahead != 0, "{error}: {expected:?}");
                return Ok(false);
            }
        };
        let expected = expected.expect("an invalid chain was taken");
        assert_eq!(chain.head, head);
        self.next = self.next.wrapping_add(1);
        self.taken.push(head);
        compare(guest, chain, &expected, input)?;
        if input.ratio(1_u8, 8)? {
            self.queue.undo_pop();
            self.next = self.next.wrapping_sub(1);
            self.taken.pop();
        }
        Ok(true)
    }

    /// Returns `count` chains at once.
    fn return_chains(&mut self, ring: &Ring, guest: &Guest, count: usize) {
        let count = count.min(self.taken.len());
        let chains: Vec<_> = self
            .taken
            .drain(..count)
            .map(|head| (head, u32::from(head) * 3))
            .collect();
        if let [(head, written)] = chains[..] {
            self.queue.add_used(head, written).unwrap();
        } else {
            self.queue.add_used_batch(&chains).unwrap();
        }
        // A driver that repeats heads can have more chains taken than the ring has entries: the last ones remain.
        let overwritten = chains.len().saturating_sub(ring.size.into());
        self.used = self.used.wrapping_add(u16::try_from(overwritten).unwrap());
        for (head, written) in chains.into_iter().skip(overwritten) {
            let address = ring.used_ring() + 4 + 8 * u64::from(self.used % ring.size);
            let element = [u32::from(head).to_le_bytes(), written.to_le_bytes()].concat();
            // A buffer may lie in the ring, but nothing is written between the return and this.
            assert_eq!(guest.read(address, 8).unwrap(), element);
            self.used = self.used.wrapping_add(1);
        }
        if count > 0 {
            assert_eq!(ring.used_index(guest), self.used);
        }
    }

    /// Interrupts the driver if it wants that.
    fn notify(&mut self, ring: &Ring, guest: &Guest, interrupts: &UsedInterrupts) {
        let before = interrupts.0.load(Ordering::SeqCst);
        let field = |offset| {
            let bytes = guest.read(ring.available_ring() + offset, 2).unwrap();
            u16::from_le_bytes([bytes[0], bytes[1]])
        };
        let count = self.used.wrapping_sub(self.notified);
        let wanted = if self.event_index {
            // The driver waits for the element of this index (virtio 1.3 §2.7.7.2).
            let event = field(4 + 2 * u64::from(ring.size));
            (0..count).any(|offset| self.notified.wrapping_add(offset) == event)
        } else {
            count > 0 && field(0) & 1 == 0
        };
        self.queue.notify_driver().unwrap();
        self.notified = self.used;
        assert_eq!(interrupts.0.load(Ordering::SeqCst) - before, usize::from(wanted));
    }
}

/// Follows a chain as virtio 1.3 §2.7.5 says. `None` if it is invalid.
fn walk(guest: &Guest, ring: &Ring, head: u16) -> Option<Expected> {
    let mut expected = Expected::default();
    let mut counts = [0; 2];
    let (mut table, mut size, mut index) = (ring.base, ring.size, head);
    let (mut left, mut is_indirect, mut total) = (ring.size, false, 0_u32);
    loop {
        if index >= size || left == 0 {
            return None;
        }
        let bytes = guest.read(table.checked_add(16 * u64::from(index))?, 16)?;
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        if flags & INDIRECT != 0 {
            if is_indirect || length % 16 != 0 || length / 16 > u32::from(u16::MAX) {
                return None;
            }
            (table, size, index, is_indirect) = (address, u16::try_from(length / 16).unwrap(), 0, true);
            left = size;
            continue;
        }
        total = total.checked_add(length)?;
        let is_writable = flags & WRITE != 0;
        if !is_writable && !expected.writable.is_empty() {
            return None;
        }
        if length > 0 {
            counts[usize::from(is_writable)] += regions(guest, address, length)?;
            let list = if is_writable {
                &mut expected.writable
            } else {
                &mut expected.readable
            };
            list.push((address, length));
            if counts.iter().any(|count| *count > MAX_BUFFERS) {
                return None;
            }
        }
        if flags & NEXT == 0 {
            return Some(expected);
        }
        index = u16::from_le_bytes([bytes[14], bytes[15]]);
        left -= 1;
    }
}

/// The number of regions in which a buffer lies. `None` if a part of it is not in memory.
fn regions(guest: &Guest, address: u64, length: u32) -> Option<usize> {
    let end = address.checked_add(length.into())?;
    let mut covered = 0;
    let mut count = 0;
    let is_grown = guest.read(ADDED.start, 1).is_some();
    for region in [LOW, ADDED, HIGH, PLUGGABLE] {
        if region == ADDED && !is_grown {
            continue;
        }
        let part = end.min(region.end).saturating_sub(address.max(region.start));
        covered += part;
        count += usize::from(part > 0);
    }
    (covered == u64::from(length)).then_some(count)
}

/// Compares the buffers of `chain` with the memory, and consumes them as the input says.
fn compare(guest: &Guest, mut chain: Chain<'_>, expected: &Expected, input: &mut Unstructured<'_>) -> Result<()> {
    let total = |buffers: &[(u64, u32)]| buffers.iter().map(|(_, length)| *length as usize).sum::<usize>();
    assert_eq!(chain.readable.len(), total(&expected.readable));
    assert_eq!(chain.writable.len(), total(&expected.writable));

    let mut source = Vec::new();
    for (address, length) in &expected.readable {
        let count = (*length as usize).min(MAX_READ - source.len());
        source.extend(guest.read(*address, count).unwrap());
    }
    let mut position = 0;
    while position < source.len() {
        let wanted = usize::from(input.arbitrary::<u8>()?) * 8 + 1;
        let count = wanted.min(source.len() - position);
        let mut bytes = vec![0; count];
        let mut part = if input.arbitrary()? {
            let before = chain.readable.len();
            let prefix = chain.readable.prefix(count);
            assert_eq!(chain.readable.len(), before);
            assert_eq!(chain.readable.split_to(count).len(), count);
            prefix
        } else {
            chain.readable.split_to(count)
        };
        assert!(part.take(&mut bytes));
        assert!(!part.take(&mut [0]));
        assert!(bytes == source[position..position + count]);
        position += count;
    }
    assert_eq!(chain.readable.len(), total(&expected.readable) - position);

    let target = expected
        .writable
        .iter()
        .flat_map(|(address, length)| *address..*address + u64::from(*length));
    let target: Vec<u64> = target.take(MAX_WRITTEN).collect();
    let count = input.int_in_range(0..=target.len())?;
    let bytes: Vec<u8> = (0..=250).cycle().take(count).collect();
    let mut space = Buffers::default();
    let middle = count / 2;
    assert!(space.append(chain.writable.split_to(middle)));
    if space.append(chain.writable.split_to(count - middle)) {
        assert_eq!(space.len(), count);
        assert_eq!(space.put(&bytes), count);
        // Where buffers overlap, the last byte remains.
        let last: HashMap<u64, u8> = target.into_iter().zip(bytes).collect();
        for (address, byte) in last {
            assert_eq!(guest.read(address, 1).unwrap(), [byte]);
        }
    }
    assert_eq!(chain.writable.len(), total(&expected.writable) - count);
    Ok(())
}
