//! virtio-entropy (virtio 1.3 §5.4): the guest's requests are filled from the host's generator.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{
    ActivateError, Activation, Device,
    queue::{DeviceQueue, QueueError},
};

const QUEUE_SIZES: [u16; 1] = [16];

/// The most bytes for one request: drivers ask for tens, and a huge one must not keep the loop.
const MAX_REQUEST: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Rng {
    queue: Option<DeviceQueue>,
}

impl Rng {
    /// Fills waiting requests; called when the queue was kicked.
    pub(crate) fn fill(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let mut bytes = [0; MAX_REQUEST];
        queue.serve(|chain| {
            let wanted = chain.writable.len().min(MAX_REQUEST);
            // Without the host's generator the request goes back empty, and the guest retries.
            let filled = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
            let written = chain.writable.put(&bytes[..filled]);
            u32::try_from(written).unwrap_or(0)
        })
    }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        let _ = queue.kick().write(1);
        self.queue = Some(queue);
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}
