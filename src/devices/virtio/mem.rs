//! virtio-mem (virtio 1.3 §5.15): memory that is plugged and unplugged while the machine runs, in blocks. The host
//! requests a size; the guest's driver plugs or unplugs blocks until it has that size.

use std::{io, ops::Range, sync::Arc};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::{
    buffers::Buffers,
    device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
    interrupt::Interrupt,
    queue::{DeviceQueue, QueueError},
};
use crate::{devices::counters::Counters, memory::MemoryRegions};

/// The size of a block in bytes: a huge page.
pub(crate) const BLOCK_SIZE: u64 = 2 << 20;

const QUEUE_SIZES: [u16; 1] = [16];

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver does not access unplugged memory.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The size of struct virtio_mem_req (§5.15.6): type and padding, then address, number of blocks and padding.
const REQUEST_SIZE: usize = 24;

/// Request types (VIRTIO_MEM_REQ_*).
const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// The state of a range of blocks, for [`REQUEST_STATE`] (VIRTIO_MEM_STATE_*).
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// Response types (VIRTIO_MEM_RESP_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Response {
    Ack = 0,
    /// The device refuses a valid request.
    Nack = 1,
    /// The request failed for now; the driver may retry.
    Busy = 2,
    /// The request is invalid.
    Error = 3,
}

pub(crate) struct Mem {
    /// The guest physical addresses that are reserved for the device.
    region: Range<u64>,
    /// Whether each block is plugged. Covers the usable part of the region, from its start: the blocks that the host
    /// has mapped.
    plugged: Vec<bool>,
    /// The size that the guest should have, in bytes.
    requested_size: u64,
    config_generation: u32,
    counters: Arc<Counters>,
    running: Option<(DeviceQueue, Arc<dyn Interrupt>)>,
}

impl Mem {
    /// A device without memory, which can grow to all of `region`. The region must consist of whole blocks.
    pub(crate) fn new(region: Range<u64>) -> Self {
        Self {
            region,
            plugged: Vec::new(),
            requested_size: 0,
            config_generation: 0,
            counters: Counters::new("mem"),
            running: None,
        }
    }

    /// Sets the size that the guest should have to `size` bytes (whole blocks), in the first `usable_size` bytes of the
    /// region. The usable part never shrinks.
    pub(crate) fn request_size(&mut self, size: u64, usable_size: u64) {
        let blocks = usize::try_from(usable_size / BLOCK_SIZE).unwrap_or(usize::MAX);
        if blocks > self.plugged.len() {
            self.plugged.resize(blocks, false);
        }
        self.requested_size = size;
        self.config_generation = self.config_generation.wrapping_add(1);
        if let Some((_, interrupt)) = &self.running {
            interrupt.notify_config_change();
        }
    }

    /// The size of all plugged blocks in bytes.
    pub(crate) fn plugged_size(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK_SIZE
    }

    /// Whether the guest has a driver for the device.
    pub(crate) fn has_driver(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the guest has the requested size.
    pub(crate) fn is_settled(&self) -> bool {
        self.plugged_size() == self.requested_size
    }

    /// Handles the requests in the queue. Call this after a kick of the queue.
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
            let mut request = [0; REQUEST_SIZE];
            let (response_type, state) = if chain.readable.take(&mut request) {
                let discard = |address, length| discard(memory.regions(), address, length);
                self.handle_request(&request, discard)
            } else {
                self.refuse("it is shorter than a request");
                (Response::Error, 0)
            };
            // struct virtio_mem_resp: type, padding, then the state for a state request.
            let mut response = [0; 10];
            response[..2].copy_from_slice(&(response_type as u16).to_le_bytes());
            response[8..].copy_from_slice(&state.to_le_bytes());
            let written = chain.writable.put(&response);
            u32::try_from(written).unwrap_or(0)
        })
    }

    /// Returns the response and, for [`REQUEST_STATE`], the state. `discard` frees a range, given as address and
    /// length, on the host.
    fn handle_request(
        &mut self,
        request: &[u8; REQUEST_SIZE],
        discard: impl Fn(u64, u64) -> io::Result<()>,
    ) -> (Response, u16) {
        self.counters.add_requests(1);
        let (response, state) = self.execute(request, discard);
        if response == Response::Error {
            self.refuse("its type or range is invalid");
        }
        (response, state)
    }

    /// Counts and logs a request of the guest that virtio forbids.
    fn refuse(&self, reason: &str) {
        self.counters.add_error();
        log::warn!(
            target: self.counters.name(),
            "queue 0: a request of the guest's driver is refused: {reason}"
        );
    }

    /// Frees a range on the host with `discard`. Returns `false` if that failed: the guest keeps the memory.
    fn free(&self, address: u64, length: u64, discard: impl Fn(u64, u64) -> io::Result<()>) -> bool {
        match discard(address, length) {
            Ok(()) => true,
            Err(error) => {
                self.counters.add_error();
                log::warn!(
                    target: self.counters.name(),
                    "queue 0: memory that the guest unplugs stays allocated, the guest retries: madvise: {error}"
                );
                false
            }
        }
    }

    fn execute(
        &mut self,
        request: &[u8; REQUEST_SIZE],
        discard: impl Fn(u64, u64) -> io::Result<()>,
    ) -> (Response, u16) {
        let [t0, t1, _, _, _, _, _, _, address @ .., c0, c1, _, _, _, _, _, _] = request;
        let (kind, count) = (u16::from_le_bytes([*t0, *t1]), u16::from_le_bytes([*c0, *c1]));
        if kind == REQUEST_UNPLUG_ALL {
            return (self.unplug_all(discard), 0);
        }
        let address = u64::from_le_bytes(*address);
        let Some(blocks) = self.block_range(address, count) else {
            return (Response::Error, 0);
        };
        let size = u64::from(count) * BLOCK_SIZE;
        let plugged = self.plugged[blocks.clone()].iter().filter(|plugged| **plugged).count();
        match kind {
            REQUEST_PLUG if plugged > 0 => (Response::Error, 0),
            REQUEST_PLUG if self.plugged_size() + size > self.requested_size => (Response::Nack, 0),
            REQUEST_PLUG => {
                self.counters.add_bytes_to_guest(size);
                self.plugged[blocks].fill(true);
                (Response::Ack, 0)
            }
            REQUEST_UNPLUG if plugged < usize::from(count) => (Response::Error, 0),
            REQUEST_UNPLUG if !self.free(address, size, discard) => (Response::Busy, 0),
            REQUEST_UNPLUG => {
                self.counters.add_bytes_from_guest(size);
                self.plugged[blocks].fill(false);
                (Response::Ack, 0)
            }
            REQUEST_STATE if plugged == usize::from(count) => (Response::Ack, STATE_PLUGGED),
            REQUEST_STATE if plugged == 0 => (Response::Ack, STATE_UNPLUGGED),
            REQUEST_STATE => (Response::Ack, STATE_MIXED),
            _ => (Response::Error, 0),
        }
    }

    fn unplug_all(&mut self, discard: impl Fn(u64, u64) -> io::Result<()>) -> Response {
        if self.plugged.contains(&true) && !self.free(self.region.start, self.usable_size(), discard) {
            return Response::Busy;
        }
        self.counters.add_bytes_from_guest(self.plugged_size());
        self.plugged.fill(false);
        Response::Ack
    }

    fn usable_size(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK_SIZE
    }

    /// The indices of `count` blocks from `address` on, if all of them are usable and there is at least one.
    fn block_range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address
            .checked_sub(self.region.start)
            .filter(|offset| offset.is_multiple_of(BLOCK_SIZE))?;
        let first = usize::try_from(offset / BLOCK_SIZE).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (count > 0 && end <= self.plugged.len()).then_some(first..end)
    }
}

/// Frees a range of guest memory on the host.
fn discard(memory: &MemoryRegions, address: u64, length: u64) -> io::Result<()> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let buffers = Buffers::from_range(memory, address, length).map_err(io::Error::other)?;
    buffers.discard(memory)
}

impl Device for Mem {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_mem_config (§5.15.4). The second word is the NUMA node and padding.
        let words = [
            BLOCK_SIZE,
            0,
            self.region.start,
            self.region.end - self.region.start,
            self.usable_size(),
            self.plugged_size(),
            self.requested_size,
        ];
        copy_config(words.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.config_generation
    }

    fn changes_configuration(&self) -> bool {
        true
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        queue.kick_again().map_err(ActivateError::Queue)?;
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
            .field("plugged_size", &self.plugged_size())
            .field("requested_size", &self.requested_size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::devices::log_capture::LogCapture;

    const START: u64 = 4 << 30;

    fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST_SIZE] {
        let mut request = [0; REQUEST_SIZE];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        request
    }

    /// A device with `requested` and `usable` blocks.
    fn device(requested: u64, usable: u64) -> Mem {
        let mut device = Mem::new(START..START + 64 * BLOCK_SIZE);
        device.request_size(requested * BLOCK_SIZE, usable * BLOCK_SIZE);
        device
    }

    fn config_word(device: &Mem, index: u64) -> u64 {
        let mut bytes = [0; 8];
        device.read_config(index * 8, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn guest_can_plug_the_requested_size_and_no_more() {
        let mut device = device(4, 8);
        let discard = |_, _| Ok(());

        assert_eq!(
            device.handle_request(&request(REQUEST_PLUG, START, 5), discard).0,
            Response::Nack
        );
        assert_eq!(
            device
                .handle_request(&request(REQUEST_PLUG, START + BLOCK_SIZE, 4), discard)
                .0,
            Response::Ack
        );
        assert!(device.is_settled());
        assert_eq!(
            device.handle_request(&request(REQUEST_PLUG, START, 1), discard).0,
            Response::Nack
        );

        assert_eq!(device.plugged_size(), 4 * BLOCK_SIZE);
        let states = [(1, 4), (0, 1), (0, 2)];
        let states = states.map(|(first, count)| {
            device
                .handle_request(&request(REQUEST_STATE, START + first * BLOCK_SIZE, count), discard)
                .1
        });
        assert_eq!(states, [STATE_PLUGGED, STATE_UNPLUGGED, STATE_MIXED]);
    }

    #[test]
    fn unplugged_blocks_are_returned_to_the_host() {
        let log = LogCapture::on_this_thread("mem");
        let discarded = RefCell::new(Vec::new());
        let discard = |address, length| {
            discarded.borrow_mut().push((address, length));
            Ok(())
        };
        let mut device = device(4, 8);
        device.handle_request(&request(REQUEST_PLUG, START, 4), discard);

        assert_eq!(
            device
                .handle_request(&request(REQUEST_UNPLUG, START + BLOCK_SIZE, 2), discard)
                .0,
            Response::Ack
        );
        assert_eq!(device.plugged_size(), 2 * BLOCK_SIZE);
        assert_eq!(
            device.handle_request(&request(REQUEST_UNPLUG_ALL, 0, 0), discard).0,
            Response::Ack
        );

        assert_eq!(device.plugged_size(), 0);
        assert_eq!(
            discarded.take(),
            [(START + BLOCK_SIZE, 2 * BLOCK_SIZE), (START, 8 * BLOCK_SIZE)]
        );
        device.handle_request(&request(REQUEST_PLUG, START, 1), discard);
        assert_eq!(
            device
                .handle_request(&request(REQUEST_UNPLUG, START, 1), |_, _| Err(
                    io::ErrorKind::OutOfMemory.into()
                ))
                .0,
            Response::Busy
        );
        assert_eq!(device.plugged_size(), BLOCK_SIZE);
        let failed =
            "queue 0: memory that the guest unplugs stays allocated, the guest retries: madvise: out of memory";
        assert_eq!(log.lines(), [failed]);
        let counters = device.counters.read();
        assert_eq!(
            (counters.bytes_to_guest, counters.bytes_from_guest),
            (5 * BLOCK_SIZE, 4 * BLOCK_SIZE)
        );
    }

    #[test]
    fn invalid_requests_get_an_error() {
        let mut device = device(4, 8);
        device.handle_request(&request(REQUEST_PLUG, START, 1), |_, _| Ok(()));
        let cases = [
            ("before the region", request(REQUEST_PLUG, START - BLOCK_SIZE, 1)),
            ("not the start of a block", request(REQUEST_PLUG, START + 4096, 1)),
            ("not usable", request(REQUEST_PLUG, START + 8 * BLOCK_SIZE, 1)),
            ("partly not usable", request(REQUEST_PLUG, START + 7 * BLOCK_SIZE, 2)),
            (
                "end of the address space",
                request(REQUEST_PLUG, u64::MAX - BLOCK_SIZE + 1, 2),
            ),
            ("no blocks", request(REQUEST_PLUG, START + BLOCK_SIZE, 0)),
            ("partly plugged already", request(REQUEST_PLUG, START, 2)),
            ("partly not plugged", request(REQUEST_UNPLUG, START, 2)),
            ("unknown type", request(4, START, 1)),
        ];
        let (log, count) = (LogCapture::on_this_thread("mem"), cases.len() as u64);
        for (name, request) in cases {
            let (response, _) = device.handle_request(&request, |_, _| panic!("{name}: memory was discarded"));
            assert_eq!(response, Response::Error, "{name}");
            let expected = "queue 0: a request of the guest's driver is refused: its type or range is invalid";
            assert_eq!(log.lines().pop().as_deref(), Some(expected), "{name}");
            assert_eq!(device.plugged_size(), BLOCK_SIZE, "{name}");
        }
        assert_eq!(
            (log.lines().len() as u64, device.counters.read().errors),
            (count, count)
        );
    }

    #[test]
    fn only_whole_usable_blocks_are_a_range() {
        for usable in [0, 1, 8, 64] {
            let device = device(0, usable);
            for block in (0..66).chain([u64::MAX / BLOCK_SIZE]) {
                for offset in [0, 1, 4096, BLOCK_SIZE - 1] {
                    let address = START.wrapping_add(block.wrapping_mul(BLOCK_SIZE)).wrapping_add(offset);
                    for count in [0, 1, 2, 8, 64, u16::MAX] {
                        let end = u128::from(block) + u128::from(count);
                        let valid = offset == 0 && count > 0 && address >= START && end <= u128::from(usable);
                        let range = device.block_range(address, count);
                        assert_eq!(
                            range.is_some(),
                            valid,
                            "{usable} usable: {count} blocks at {address:#x}"
                        );
                        assert!(range.is_none_or(|range| range.len() == usize::from(count)));
                    }
                }
            }
        }
    }

    #[test]
    fn configuration_reports_plugged_and_requested_size() {
        let mut device = device(4, 8);
        device.handle_request(&request(REQUEST_PLUG, START, 3), |_, _| Ok(()));
        let config = [0, 1, 2, 3, 4, 5, 6].map(|index| config_word(&device, index));
        assert_eq!(
            config,
            [
                BLOCK_SIZE,
                0,
                START,
                64 * BLOCK_SIZE,
                8 * BLOCK_SIZE,
                3 * BLOCK_SIZE,
                4 * BLOCK_SIZE
            ]
        );

        let before = device.config_generation();
        device.request_size(2 * BLOCK_SIZE, 4 * BLOCK_SIZE);

        assert_ne!(device.config_generation(), before);
        assert_eq!(
            [4, 6].map(|index| config_word(&device, index)),
            [8 * BLOCK_SIZE, 2 * BLOCK_SIZE],
            "the usable part does not shrink"
        );
        assert!(!device.is_settled());
    }
}
