//! virtio-entropy (virtio 1.3 §5.4): fills the guest's requests from the host's random number generator.

use std::{io, sync::Arc};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{
    device::{ActivateError, Activation, Device},
    queue::{DeviceQueue, QueueError},
};
use crate::devices::counters::Counters;

const QUEUE_SIZES: [u16; 1] = [16];

/// The maximum number of bytes for one request. Drivers usually request tens of bytes; a huge request must not delay
/// the event loop.
const MAX_REQUEST_SIZE: usize = 4096;

#[derive(Debug)]
pub(crate) struct Rng {
    counters: Arc<Counters>,
    fill: fn(&mut [u8]) -> io::Result<usize>,
    queue: Option<DeviceQueue>,
}

impl Default for Rng {
    fn default() -> Self {
        Self {
            counters: Counters::new("rng"),
            fill: |bytes| Ok(getrandom(bytes, GetRandomFlags::empty())?),
            queue: None,
        }
    }
}

impl Rng {
    /// Fills pending requests. Call this after a kick of the queue.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let mut bytes = [0; MAX_REQUEST_SIZE];
        queue.serve(|chain| {
            let wanted = chain.writable.len().min(MAX_REQUEST_SIZE);
            self.counters.add_requests(1);
            let filled = (self.fill)(&mut bytes[..wanted]).unwrap_or_else(|error| {
                self.counters.add_error();
                log::warn!(
                    target: self.counters.name(),
                    "queue 0: the guest gets no random numbers and retries: getrandom: {error}"
                );
                0
            });
            let written = chain.writable.put(&bytes[..filled]);
            self.counters.add_bytes_to_guest(written as u64);
            u32::try_from(written).unwrap_or(0)
        })
    }
}

impl Device for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        queue.kick_again().map_err(ActivateError::Queue)?;
        self.queue = Some(queue);
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::{
        log_capture::LogCapture,
        virtio::mock::{WRITE, descriptor, device_queue, memory},
    };

    #[test]
    fn error_of_the_hosts_generator_is_logged_and_the_guest_gets_an_empty_buffer() {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        mock.desc_table().store(0, descriptor(0x8000, 32, WRITE, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let mut rng = Rng {
            fill: |_| Err(io::Error::from_raw_os_error(libc::EIO)),
            queue: Some(device_queue(&mock, &memory).0),
            ..Rng::default()
        };
        let log = LogCapture::on_this_thread("rng");

        rng.serve().unwrap();

        let expected =
            "queue 0: the guest gets no random numbers and retries: getrandom: Input/output error (os error 5)";
        assert_eq!(log.lines(), [expected]);
        assert_eq!(mock.used().ring().ref_at(0).unwrap().load().len(), 0);
        assert_eq!(rng.counters.read().errors, 1);

        mock.avail().ring().ref_at(1).unwrap().store(0);
        mock.avail().idx().store(2);
        rng.fill = Rng::default().fill;
        rng.serve().unwrap();
        assert_ne!(memory.read_obj::<[u8; 32]>(GuestAddress(0x8000)).unwrap(), [0; 32]);
        assert_eq!(rng.counters.read().bytes_to_guest, 32);
    }
}
