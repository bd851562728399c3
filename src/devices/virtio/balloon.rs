//! virtio-balloon (virtio 1.3 §5.5), used for free page reporting and statistics: the guest reports pages that it does
//! not use, and the host reclaims them. A page is allocated again when the guest next uses it. The statistics show the
//! total memory of the guest's kernel. The host never inflates the balloon: the configuration reads as zero.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device},
    queue::{DeviceQueue, QueueError},
};
use crate::devices::counters::Counters;

/// The number of mandatory queues, which are not used: inflate and deflate.
pub(crate) const UNUSED_QUEUES: usize = 2;

/// The size of the unused queues, and of the statistics queue, in which a driver has one buffer.
const SMALL_QUEUE_SIZE: u16 = 16;

const REPORTING_QUEUE_SIZE: u16 = 64;

/// VIRTIO_BALLOON_F_STATS_VQ.
const STATISTICS: u64 = 1 << 1;

/// VIRTIO_BALLOON_F_REPORTING.
const PAGE_REPORTING: u64 = 1 << 5;

/// The size of struct virtio_balloon_stat (§5.5.6.3), which is packed: a tag of 16 bits, and a value of 64 bits.
const STATISTIC_SIZE: usize = 10;

/// The tag of the kernel's total memory, in bytes (VIRTIO_BALLOON_S_MEMTOT). Memory that is offline does not count.
const TOTAL_MEMORY: u16 = 5;

/// The maximum number of statistics that are read from a buffer. Linux sends 10 to 16.
const MAX_STATISTICS: usize = 64;

#[derive(Debug)]
pub(crate) struct Balloon {
    counters: Arc<Counters>,
    offers_statistics: bool,
    reporting: Option<DeviceQueue>,
    statistics: Option<StatisticsQueue>,
}

/// The queue in which the driver provides a buffer with statistics. When the device returns the buffer, the driver
/// provides it again with new ones.
#[derive(Debug)]
struct StatisticsQueue {
    queue: DeviceQueue,
    /// The buffer, while the device has it.
    head: Option<u16>,
    /// New statistics were requested.
    is_requested: bool,
}

impl Balloon {
    /// A device with a statistics queue if `offers_statistics`.
    pub(crate) fn new(offers_statistics: bool) -> Self {
        Self {
            counters: Counters::new("balloon"),
            offers_statistics,
            reporting: None,
            statistics: None,
        }
    }

    /// Requests new statistics from the driver. [`Self::serve_statistics`] returns them after the next kick of the
    /// queue. Returns `false` if nothing could be requested: the driver uses no statistics queue, or has not
    /// provided its buffer yet.
    pub(crate) fn request_statistics(&mut self) -> Result<bool, QueueError> {
        let Some(StatisticsQueue {
            queue,
            head,
            is_requested,
        }) = &mut self.statistics
        else {
            return Ok(false);
        };
        if let Some(head) = head.take() {
            *is_requested = true;
            queue.add_used(head, 0)?;
            queue.notify_driver()?;
        }
        Ok(*is_requested)
    }

    /// Takes the buffer with the driver's statistics. Returns the total memory of the guest's kernel, in bytes, if
    /// statistics were requested and include it. Call this after a kick of the statistics queue.
    pub(crate) fn serve_statistics(&mut self) -> Result<Option<u64>, QueueError> {
        let Some(statistics) = &mut self.statistics else {
            return Ok(None);
        };
        // One buffer per call, so that a guest that keeps adding buffers cannot occupy this thread.
        let chain = statistics.queue.pop()?;
        if statistics.queue.resume_kicks()? {
            statistics.queue.kick_again()?;
        }
        let Some(mut chain) = chain else { return Ok(None) };
        self.counters.add_requests(1);
        let mut total = None;
        let mut statistic = [0; STATISTIC_SIZE];
        for _ in 0..MAX_STATISTICS {
            if !chain.readable.take(&mut statistic) {
                break;
            }
            let [t0, t1, value @ ..] = statistic;
            if u16::from_le_bytes([t0, t1]) == TOTAL_MEMORY {
                total = Some(u64::from_le_bytes(value));
            }
        }
        if let Some(earlier) = statistics.head.replace(chain.head) {
            // A driver that has more than one buffer gets the others back.
            statistics.queue.add_used(earlier, 0)?;
            statistics.queue.notify_driver()?;
        }
        let was_requested = std::mem::take(&mut statistics.is_requested);
        Ok(total.filter(|_| was_requested))
    }

    /// Frees the reported pages on the host. Call this after a kick of the reporting queue.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.reporting else {
            return Ok(());
        };
        let memory = queue.memory().clone();
        queue.serve(|chain| {
            // On failure, the pages stay allocated, as if the guest used them.
            self.counters.add_requests(1);
            match chain.writable.discard(memory.regions()) {
                Ok(()) => self.counters.add_bytes_from_guest(chain.writable.len() as u64),
                Err(error) => {
                    self.counters.add_error();
                    log::warn!(
                        target: self.counters.name(),
                        "memory that the guest freed stays allocated: madvise: {error}"
                    );
                }
            }
            0
        })
    }
}

impl Device for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn features(&self) -> u64 {
        let statistics = if self.offers_statistics { STATISTICS } else { 0 };
        COMMON_FEATURES | PAGE_REPORTING | statistics
    }

    /// A queue whose feature is not offered takes no index: later queues move up, as Linux numbers them.
    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![SMALL_QUEUE_SIZE; UNUSED_QUEUES];
        sizes.extend(self.offers_statistics.then_some(SMALL_QUEUE_SIZE));
        sizes.push(REPORTING_QUEUE_SIZE);
        sizes
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let has = |feature| activation.features & feature != 0;
        // A driver sets up only the queues of features that it has accepted.
        let mut queues = activation.queues.into_iter().skip(UNUSED_QUEUES);
        let statistics = if has(STATISTICS) { queues.next() } else { None };
        self.reporting = if has(PAGE_REPORTING) { queues.next() } else { None };
        for queue in statistics.iter().chain(&self.reporting) {
            queue.kick_again().map_err(ActivateError::Queue)?;
        }
        self.statistics = statistics.map(|queue| StatisticsQueue {
            queue,
            head: None,
            is_requested: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.reporting = None;
        self.statistics = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::{Queue, QueueT, mock::MockSplitQueue};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::{
        devices::{
            log_capture::LogCapture,
            virtio::mock::{InterruptCounter, NEXT, WRITE, descriptor, device_queue},
        },
        memory::{GuestMemory, MemoryRegions, allocate, create_sealed_file},
    };

    #[test]
    fn whole_reported_pages_go_back_to_the_host() {
        for shared in [false, true] {
            let memory = GuestMemory::new(allocate(2 << 20, shared.then(|| create_sealed_file().unwrap())).unwrap());
            let mock = MockSplitQueue::new(memory.regions(), 16);
            memory.write_slice(&[7; 64 << 10], GuestAddress(0x1_0000)).unwrap();
            // Two whole pages; then half a page, a whole page, and half a page.
            let table = mock.desc_table();
            table.store(0, descriptor(0x1_1000, 0x2000, WRITE | NEXT, 1)).unwrap();
            table.store(1, descriptor(0x1_4800, 0x2000, WRITE, 0)).unwrap();
            mock.avail().idx().store(1);
            let mut balloon = Balloon {
                reporting: Some(device_queue(&mock, &memory).0),
                ..Balloon::new(false)
            };

            balloon.serve().unwrap();

            let pages: Vec<u8> = (0..8_u64)
                .map(|page| memory.read_obj(GuestAddress(0x1_0000 + page * 0x1000)).unwrap())
                .collect();
            assert_eq!(pages, [7, 0, 0, 7, 7, 0, 7, 7], "shared: {shared}");
            assert_eq!(u16::from_le(mock.used().idx().load()), 1);
        }
    }

    #[test]
    fn memory_that_the_host_cannot_free_is_logged() {
        let memory = GuestMemory::new(allocate(2 << 20, None).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        let page = 0x1_0000;
        mock.desc_table().store(0, descriptor(page, 0x1000, WRITE, 0)).unwrap();
        mock.avail().idx().store(1);
        let mut balloon = Balloon {
            reporting: Some(device_queue(&mock, &memory).0),
            ..Balloon::new(false)
        };
        let address = memory.regions().get_host_address(GuestAddress(page)).unwrap();
        // madvise refuses to free locked pages.
        // SAFETY: the page is mapped memory of the guest.
        unsafe { rustix::mm::mlock(address.cast(), 0x1000) }.unwrap();
        let log = LogCapture::on_this_thread("balloon");

        balloon.serve().unwrap();

        let expected = "memory that the guest freed stays allocated: madvise: Invalid argument (os error 22)";
        assert_eq!(log.lines(), [expected]);
        let counters = balloon.counters.read();
        assert_eq!(
            (counters.requests, counters.errors, counters.bytes_from_guest),
            (1, 1, 0)
        );
    }

    /// Makes a buffer with `statistics`, pairs of tag and value, available as the driver does.
    fn provide_statistics(memory: &GuestMemory, mock: &MockSplitQueue<'_, MemoryRegions>, statistics: &[(u16, u64)]) {
        let mut bytes = Vec::new();
        for (tag, value) in statistics {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        memory.write_slice(&bytes, GuestAddress(0x8000)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        mock.desc_table().store(0, descriptor(0x8000, length, 0, 0)).unwrap();
        let next = u16::from_le(mock.avail().idx().load());
        mock.avail().ring().ref_at(usize::from(next % 16)).unwrap().store(0);
        mock.avail().idx().store((next + 1).to_le());
    }

    #[test]
    fn statistics_are_returned_once_for_each_request() {
        let memory = GuestMemory::new(allocate(2 << 20, None).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        let used = || u16::from_le(mock.used().idx().load());
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(true);
        let (kick, interrupts) = (EventFd::new(0).unwrap(), Arc::new(InterruptCounter::default()));
        let mut balloon = Balloon {
            statistics: Some(StatisticsQueue {
                queue: DeviceQueue::new(2, queue, kick, memory.clone(), interrupts),
                head: None,
                is_requested: false,
            }),
            ..Balloon::new(true)
        };
        assert!(!balloon.request_statistics().unwrap(), "the driver has no buffer yet");

        provide_statistics(&memory, &mock, &[(4, 1), (5, 256 << 20)]);
        assert_eq!(balloon.serve_statistics().unwrap(), None, "not requested");
        assert_eq!(used(), 0, "the device keeps the buffer");

        for (statistics, expected) in [
            (&[(0, 7), (5, 512 << 20), (6, 9)][..], Some(512 << 20)),
            (&[(0, 7)], None),
            (&[], None),
            (&[(5, u64::MAX)], Some(u64::MAX)),
        ] {
            let before = used();
            assert!(balloon.request_statistics().unwrap());
            assert_eq!(used(), before + 1, "the driver has its buffer again");
            assert!(balloon.request_statistics().unwrap(), "a request is pending");
            assert_eq!(used(), before + 1);
            assert_eq!(balloon.serve_statistics().unwrap(), None, "no kick yet");
            provide_statistics(&memory, &mock, statistics);
            assert_eq!(balloon.serve_statistics().unwrap(), expected);
            // The device has asked for a kick when the driver provides its next buffer.
            let avail_event = GuestAddress(mock.used_addr().0 + 4 + 8 * 16);
            assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), used() + 1);
        }
        // A driver that adds a second buffer gets the first one back.
        let before = used();
        provide_statistics(&memory, &mock, &[(5, 1)]);
        assert_eq!(balloon.serve_statistics().unwrap(), None);
        assert_eq!(used(), before + 1);
    }

    #[test]
    fn queues_are_assigned_to_the_features_that_the_driver_accepted() {
        let memory = GuestMemory::new(allocate(2 << 20, None).unwrap());
        for (offers, features, has_statistics, has_reporting) in [
            (false, PAGE_REPORTING, false, true),
            (false, 0, false, false),
            (true, PAGE_REPORTING | STATISTICS, true, true),
            (true, STATISTICS, true, false),
            (true, PAGE_REPORTING, false, true),
            (true, 0, false, false),
        ] {
            let count = UNUSED_QUEUES + usize::from(has_statistics) + usize::from(has_reporting);
            let mocks: Vec<_> = (0..count).map(|_| MockSplitQueue::new(memory.regions(), 16)).collect();
            let mut balloon = Balloon::new(offers);
            assert_eq!(balloon.features() & STATISTICS != 0, offers);
            assert_eq!(balloon.queue_sizes().len(), 3 + usize::from(offers));
            let activation = Activation {
                features,
                queues: mocks.iter().map(|mock| device_queue(mock, &memory).0).collect(),
                interrupt: Arc::new(InterruptCounter::default()),
                memory: memory.clone(),
            };

            balloon.activate(activation).unwrap();

            let found = (balloon.statistics.is_some(), balloon.reporting.is_some());
            assert_eq!(found, (has_statistics, has_reporting), "{offers} {features:#x}");
            balloon.reset();
            assert!(balloon.statistics.is_none() && balloon.reporting.is_none());
        }
    }

    #[test]
    fn report_outside_guest_memory_is_a_queue_error() {
        let memory = GuestMemory::new(allocate(2 << 20, Some(create_sealed_file().unwrap())).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        mock.desc_table()
            .store(0, descriptor(4 << 20, 0x1000, WRITE, 0))
            .unwrap();
        mock.avail().idx().store(1);
        let mut balloon = Balloon {
            reporting: Some(device_queue(&mock, &memory).0),
            ..Balloon::new(false)
        };

        assert!(balloon.serve().is_err());
    }
}
