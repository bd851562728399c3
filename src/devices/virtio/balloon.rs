//! virtio-balloon (virtio 1.3 §5.5), used for free page reporting only: the guest reports pages that it does not use,
//! and the host reclaims them. A page is allocated again when the guest next uses it. The host never inflates the
//! balloon: the configuration reads as zero.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device},
    queue::{DeviceQueue, QueueError},
};
use crate::devices::counters::Counters;

/// Inflate and deflate queues: mandatory, unused. Then the reporting queue, which has index 2 in Linux because the
/// queues of features that are not offered are not counted.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];

/// VIRTIO_BALLOON_F_REPORTING.
const PAGE_REPORTING: u64 = 1 << 5;

#[derive(Debug)]
pub(crate) struct Balloon {
    counters: Arc<Counters>,
    reporting: Option<DeviceQueue>,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            counters: Counters::new("balloon"),
            reporting: None,
        }
    }
}

impl Balloon {
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
                        "queue 2: memory that the guest freed stays allocated: madvise: {error}"
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
        COMMON_FEATURES | PAGE_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let reporting = activation.features & PAGE_REPORTING != 0;
        // A driver that did not accept the feature sets up the first two queues only.
        self.reporting = activation.queues.pop().filter(|_| reporting);
        if let Some(queue) = &self.reporting {
            queue.kick_again().map_err(ActivateError::Queue)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.reporting = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{
        devices::{
            log_capture::LogCapture,
            virtio::mock::{NEXT, WRITE, descriptor, device_queue},
        },
        memory::{GuestMemory, allocate},
    };

    #[test]
    fn whole_reported_pages_go_back_to_the_host() {
        for shared in [false, true] {
            let memory = GuestMemory::new(allocate(2 << 20, shared).unwrap());
            let mock = MockSplitQueue::new(memory.regions(), 16);
            memory.write_slice(&[7; 64 << 10], GuestAddress(0x1_0000)).unwrap();
            // Two whole pages; then half a page, a whole page, and half a page.
            let table = mock.desc_table();
            table.store(0, descriptor(0x1_1000, 0x2000, WRITE | NEXT, 1)).unwrap();
            table.store(1, descriptor(0x1_4800, 0x2000, WRITE, 0)).unwrap();
            mock.avail().idx().store(1);
            let mut balloon = Balloon {
                reporting: Some(device_queue(&mock, &memory).0),
                ..Balloon::default()
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
        let memory = GuestMemory::new(allocate(2 << 20, false).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        let page = 0x1_0000;
        mock.desc_table().store(0, descriptor(page, 0x1000, WRITE, 0)).unwrap();
        mock.avail().idx().store(1);
        let mut balloon = Balloon {
            reporting: Some(device_queue(&mock, &memory).0),
            ..Balloon::default()
        };
        let address = memory.regions().get_host_address(GuestAddress(page)).unwrap();
        // madvise refuses to free locked pages.
        // SAFETY: the page is mapped memory of the guest.
        unsafe { rustix::mm::mlock(address.cast(), 0x1000) }.unwrap();
        let log = LogCapture::on_this_thread("balloon");

        balloon.serve().unwrap();

        let expected = "queue 2: memory that the guest freed stays allocated: madvise: Invalid argument (os error 22)";
        assert_eq!(log.lines(), [expected]);
        let counters = balloon.counters.read();
        assert_eq!(
            (counters.requests, counters.errors, counters.bytes_from_guest),
            (1, 1, 0)
        );
    }

    #[test]
    fn report_outside_guest_memory_is_a_queue_error() {
        let memory = GuestMemory::new(allocate(2 << 20, true).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        mock.desc_table()
            .store(0, descriptor(4 << 20, 0x1000, WRITE, 0))
            .unwrap();
        mock.avail().idx().store(1);
        let mut balloon = Balloon {
            reporting: Some(device_queue(&mock, &memory).0),
            ..Balloon::default()
        };

        assert!(balloon.serve().is_err());
    }
}
