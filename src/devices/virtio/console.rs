//! virtio-console (virtio 1.3 §5.3), output only: the guest's kernel log. The host keeps its tail.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{
    device::{ActivateError, Activation, Device},
    queue::{DeviceQueue, QueueError},
};
use crate::{
    control::MAX_CONSOLE_TAIL,
    devices::{console_tail::ConsoleTail, counters::Counters},
};

/// Receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [16, 16];

#[derive(Debug)]
pub(crate) struct Console {
    tail: Arc<ConsoleTail>,
    counters: Arc<Counters>,
    transmit: Option<DeviceQueue>,
}

impl Console {
    /// A console whose output is appended to `tail`.
    pub(crate) fn new(tail: Arc<ConsoleTail>) -> Self {
        Self {
            tail,
            counters: Counters::new("console"),
            transmit: None,
        }
    }

    /// Appends the guest's output to the tail. Call this after a kick of the transmit queue.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        let mut bytes = [0; 512];
        queue.pause_kicks()?;
        queue.serve(|chain| {
            // A chain may have 4 GiB, and the event loop must not copy more of it than is kept.
            self.counters.add_requests(1);
            self.counters.add_bytes_from_guest(chain.readable.len() as u64);
            let surplus = chain.readable.len().saturating_sub(MAX_CONSOLE_TAIL);
            chain.readable.split_to(surplus);
            while chain.readable.len() > 0 {
                let count = chain.readable.len().min(bytes.len());
                if chain.readable.take(&mut bytes[..count]) {
                    self.tail.append(&bytes[..count]);
                }
            }
            0
        })
    }
}

impl Device for Console {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [_receive, transmit] = activation.take_queues()?;
        // The event loop may have consumed a kick before activation.
        transmit.kick_again().map_err(ActivateError::Queue)?;
        self.transmit = Some(transmit);
        Ok(())
    }

    fn reset(&mut self) {
        self.transmit = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::mock::{NEXT, descriptor, device_queue, memory};

    #[test]
    fn only_the_tail_of_a_long_chain_is_copied() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        // 16 times the same 64 KiB: more than the tail, whose end is known.
        let length = 0x1_0000;
        memory
            .write_slice(b"the end", GuestAddress(0x8_0000 + length - 7))
            .unwrap();
        for index in 0..16 {
            let flags = if index < 15 { NEXT } else { 0 };
            let length = u32::try_from(length).unwrap();
            mock.desc_table()
                .store(index, descriptor(0x8_0000, length, flags, index + 1))
                .unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let tail = Arc::new(ConsoleTail::default());
        let mut console = Console::new(tail.clone());
        console.transmit = Some(device_queue(&mock, &memory).0);

        console.serve().unwrap();

        let bytes = tail.to_vec();
        assert_eq!(bytes.len(), MAX_CONSOLE_TAIL);
        assert!(bytes.ends_with(b"the end"));
        assert_eq!(mock.used().idx().load(), 1);
    }
}
