//! virtio-mem (virtio 1.3 §5.15): memory that comes and goes while the machine runs, in blocks. The host
//! asks for an amount; the guest's driver takes and gives blocks until it has that.

use std::{ops::Range, sync::Arc};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::{
    ActivateError, Activation, COMMON_FEATURES, Device, Interrupt,
    buffers::Buffers,
    copy_config,
    queue::{DeviceQueue, QueueError},
};
use crate::memory::MemoryRegions;

/// The size of a block, in bytes: a huge page.
pub(crate) const BLOCK: u64 = 2 << 20;

const QUEUE_SIZES: [u16; 1] = [16];

/// The driver keeps its hands off memory that is not plugged (VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Requests (§5.15.6) and their length: type and padding, then an address, a count and padding.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const REQUEST: usize = 24;

/// Of what `STATE` asks for.
const ALL_PLUGGED: u16 = 0;
const ALL_UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Done = 0,
    Refused = 1,
    Busy = 2,
    Wrong = 3,
}

/// The device.
pub(crate) struct Mem {
    /// All addresses that it may ever have.
    region: Range<u64>,
    /// The part of it, from its start, where there is memory on the host: a block each.
    plugged: Vec<bool>,
    /// How much the guest should have, in bytes.
    requested: u64,
    generation: u32,
    running: Option<(DeviceQueue, Arc<dyn Interrupt>)>,
}

impl Mem {
    /// A device without memory, which may get it anywhere in `region`, whole [`BLOCK`]s.
    pub(crate) fn new(region: Range<u64>) -> Self {
        Self {
            region,
            plugged: Vec::new(),
            requested: 0,
            generation: 0,
            running: None,
        }
    }

    /// Asks the guest to have `bytes`, whole blocks, and lets it use the first `usable` bytes of the region
    /// for that, which never become fewer.
    pub(crate) fn request(&mut self, bytes: u64, usable: u64) {
        let blocks = usize::try_from(usable / BLOCK).unwrap_or(usize::MAX);
        if blocks > self.plugged.len() {
            self.plugged.resize(blocks, false);
        }
        self.requested = bytes;
        self.generation = self.generation.wrapping_add(1);
        if let Some((_, interrupt)) = &self.running {
            interrupt.config_changed();
        }
    }

    /// How much the guest has, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK
    }

    /// Whether the guest has as much as it should.
    pub(crate) fn is_settled(&self) -> bool {
        self.size() == self.requested
    }

    /// Answers what is in the queue; called when it was kicked.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some((mut queue, interrupt)) = self.running.take() else {
            return Ok(());
        };
        let outcome = self.serve_queue(&mut queue);
        self.running = Some((queue, interrupt));
        outcome
    }

    fn serve_queue(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let memory = queue.memory().clone();
        queue.serve(|chain| {
            let mut request = [0; REQUEST];
            let (answer, state) = if chain.readable.take(&mut request) {
                self.answer(&request, |address, length| discard(memory.regions(), address, length))
            } else {
                (Answer::Wrong, 0)
            };
            // struct virtio_mem_resp: type, padding, state.
            let mut response = [0; 10];
            response[..2].copy_from_slice(&(answer as u16).to_le_bytes());
            response[8..].copy_from_slice(&state.to_le_bytes());
            let written = chain.writable.put(&response);
            u32::try_from(written).unwrap_or(0)
        })
    }

    /// The answer, and for [`STATE`] the state.
    fn answer(&mut self, request: &[u8; REQUEST], discard: impl Fn(u64, u64) -> bool) -> (Answer, u16) {
        let [t0, t1, _, _, _, _, _, _, address @ .., c0, c1, _, _, _, _, _, _] = request;
        let (kind, count) = (u16::from_le_bytes([*t0, *t1]), u16::from_le_bytes([*c0, *c1]));
        if kind == UNPLUG_ALL {
            return (self.unplug_all(discard), 0);
        }
        let address = u64::from_le_bytes(*address);
        let Some(blocks) = self.blocks(address, count) else {
            return (Answer::Wrong, 0);
        };
        let size = u64::from(count) * BLOCK;
        let plugged = self.plugged[blocks.clone()].iter().filter(|plugged| **plugged).count();
        match kind {
            PLUG if plugged > 0 => (Answer::Wrong, 0),
            PLUG if self.size() + size > self.requested => (Answer::Refused, 0),
            PLUG => {
                self.plugged[blocks].fill(true);
                (Answer::Done, 0)
            }
            UNPLUG if plugged < usize::from(count) => (Answer::Wrong, 0),
            UNPLUG if !discard(address, size) => (Answer::Busy, 0),
            UNPLUG => {
                self.plugged[blocks].fill(false);
                (Answer::Done, 0)
            }
            STATE if plugged == usize::from(count) => (Answer::Done, ALL_PLUGGED),
            STATE if plugged == 0 => (Answer::Done, ALL_UNPLUGGED),
            STATE => (Answer::Done, MIXED),
            _ => (Answer::Wrong, 0),
        }
    }

    fn unplug_all(&mut self, discard: impl Fn(u64, u64) -> bool) -> Answer {
        let usable = self.plugged.len() as u64 * BLOCK;
        if self.plugged.contains(&true) && !discard(self.region.start, usable) {
            return Answer::Busy;
        }
        self.plugged.fill(false);
        Answer::Done
    }

    /// The blocks that a request names, if there is memory for all of them.
    fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address
            .checked_sub(self.region.start)
            .filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (count > 0 && end <= self.plugged.len()).then_some(first..end)
    }
}

/// Gives memory back to the host; `false` if it does not take it.
fn discard(memory: &MemoryRegions, address: u64, length: u64) -> bool {
    let buffers = usize::try_from(length).map(|length| Buffers::over(memory, address, length));
    matches!(buffers, Ok(Ok(buffers)) if buffers.discard(memory).is_ok())
}

impl Device for Mem {
    fn kind(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_mem_config: the second word is the NUMA node, with padding.
        let words = [
            BLOCK,
            0,
            self.region.start,
            self.region.end - self.region.start,
            self.plugged.len() as u64 * BLOCK,
            self.size(),
            self.requested,
        ];
        copy_config(words.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.generation
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        let _ = queue.kick().write(1);
        self.running = Some((queue, activation.interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }
}

impl std::fmt::Debug for Mem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Mem")
            .field("region", &self.region)
            .field("size", &self.size())
            .field("requested", &self.requested)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const START: u64 = 4 << 30;

    fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
        let mut request = [0; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        request
    }

    fn device(requested: u64, usable: u64) -> Mem {
        let mut device = Mem::new(START..START + 64 * BLOCK);
        device.request(requested * BLOCK, usable * BLOCK);
        device
    }

    fn word(device: &Mem, index: u64) -> u64 {
        let mut bytes = [0; 8];
        device.read_config(index * 8, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn guest_has_what_was_asked_for_and_not_a_block_more() {
        let mut device = device(4, 8);
        let kept = |_, _| true;

        assert_eq!(device.answer(&request(PLUG, START, 5), kept).0, Answer::Refused);
        assert_eq!(device.answer(&request(PLUG, START + BLOCK, 4), kept).0, Answer::Done);
        assert!(device.is_settled());
        assert_eq!(device.answer(&request(PLUG, START, 1), kept).0, Answer::Refused);

        assert_eq!(device.size(), 4 * BLOCK);
        let states = [(1, 4), (0, 1), (0, 2)];
        let states = states.map(|(first, count)| device.answer(&request(STATE, START + first * BLOCK, count), kept).1);
        assert_eq!(states, [ALL_PLUGGED, ALL_UNPLUGGED, MIXED]);
    }

    #[test]
    fn unplugged_blocks_go_back_to_the_host() {
        let discarded = RefCell::new(Vec::new());
        let discard = |address, length| {
            discarded.borrow_mut().push((address, length));
            true
        };
        let mut device = device(4, 8);
        device.answer(&request(PLUG, START, 4), discard);

        assert_eq!(
            device.answer(&request(UNPLUG, START + BLOCK, 2), discard).0,
            Answer::Done
        );
        assert_eq!(device.size(), 2 * BLOCK);
        assert_eq!(device.answer(&request(UNPLUG_ALL, 0, 0), discard).0, Answer::Done);

        assert_eq!(device.size(), 0);
        assert_eq!(discarded.take(), [(START + BLOCK, 2 * BLOCK), (START, 8 * BLOCK)]);
        device.answer(&request(PLUG, START, 1), discard);
        assert_eq!(device.answer(&request(UNPLUG, START, 1), |_, _| false).0, Answer::Busy);
        assert_eq!(device.size(), BLOCK);
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        let mut device = device(4, 8);
        device.answer(&request(PLUG, START, 1), |_, _| true);
        let cases = [
            ("before the region", request(PLUG, START - BLOCK, 1)),
            ("not a block's start", request(PLUG, START + 4096, 1)),
            ("no memory on the host", request(PLUG, START + 8 * BLOCK, 1)),
            ("partly no memory on the host", request(PLUG, START + 7 * BLOCK, 2)),
            ("address at the end of all", request(PLUG, u64::MAX - BLOCK + 1, 2)),
            ("no block", request(PLUG, START + BLOCK, 0)),
            ("plugged already", request(PLUG, START, 2)),
            ("not plugged", request(UNPLUG, START, 2)),
            ("unknown", request(4, START, 1)),
        ];
        for (name, request) in cases {
            let answer = device.answer(&request, |_, _| panic!("{name} discards"));
            assert_eq!(answer.0, Answer::Wrong, "{name}");
            assert_eq!(device.size(), BLOCK, "{name}");
        }
    }

    #[test]
    fn driver_reads_what_it_has_and_should_have() {
        let mut device = device(4, 8);
        device.answer(&request(PLUG, START, 3), |_, _| true);
        let config = [0, 1, 2, 3, 4, 5, 6].map(|index| word(&device, index));
        assert_eq!(config, [BLOCK, 0, START, 64 * BLOCK, 8 * BLOCK, 3 * BLOCK, 4 * BLOCK]);

        let before = device.config_generation();
        device.request(2 * BLOCK, 4 * BLOCK);

        assert_ne!(device.config_generation(), before);
        assert_eq!(
            [4, 6].map(|index| word(&device, index)),
            [8 * BLOCK, 2 * BLOCK],
            "what is usable stays"
        );
        assert!(!device.is_settled());
    }
}
