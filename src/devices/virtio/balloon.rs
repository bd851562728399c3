//! virtio-balloon (virtio 1.3 §5.5), for one thing: the guest reports pages that it does not use, and the
//! host takes them back until they are used again. Nothing is asked of the guest.

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{
    ActivateError, Activation, COMMON_FEATURES, Device,
    queue::{DeviceQueue, QueueError},
};

/// Of inflation and deflation, which must be there and have nothing to do; then that of reports, which has
/// the next number where the features between are not offered, as Linux counts.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];

/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    reports: Option<DeviceQueue>,
}

impl Balloon {
    /// Takes back what was reported; called when the queue of reports was kicked.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.reports else {
            return Ok(());
        };
        let memory = queue.memory().clone();
        queue.serve(|chain| {
            // What the host does not take stays the guest's, as if it were in use.
            let _ = chain.writable.discard(memory.regions());
            0
        })
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let reporting = activation.features & REPORTING != 0;
        // Without the feature a driver sets up the first two only.
        self.reports = activation.queues.pop().filter(|_| reporting);
        if let Some(reports) = &self.reports {
            let _ = reports.kick().write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.reports = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{
        devices::virtio::queue::tests::{NEXT, WRITE, descriptor, device_queue},
        memory::{GuestMemory, allocate},
    };

    #[test]
    fn reported_pages_go_back_to_the_host_and_nothing_beside_them() {
        for shared in [false, true] {
            let memory = GuestMemory::new(allocate(2 << 20, shared).unwrap());
            let mock = MockSplitQueue::new(memory.regions(), 16);
            memory.write_slice(&[7; 64 << 10], GuestAddress(0x1_0000)).unwrap();
            // Whole pages; half a page before one, and half of the next.
            let table = mock.desc_table();
            table.store(0, descriptor(0x1_1000, 0x2000, WRITE | NEXT, 1)).unwrap();
            table.store(1, descriptor(0x1_4800, 0x2000, WRITE, 0)).unwrap();
            mock.avail().idx().store(1);
            let mut balloon = Balloon {
                reports: Some(device_queue(&mock, &memory).0),
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
    fn report_of_what_is_no_memory_breaks_the_queue_and_nothing_else() {
        let memory = GuestMemory::new(allocate(2 << 20, true).unwrap());
        let mock = MockSplitQueue::new(memory.regions(), 16);
        mock.desc_table()
            .store(0, descriptor(4 << 20, 0x1000, WRITE, 0))
            .unwrap();
        mock.avail().idx().store(1);
        let mut balloon = Balloon {
            reports: Some(device_queue(&mock, &memory).0),
        };

        assert!(balloon.serve().is_err());
    }
}
