//! virtio-entropy (virtio 1.3 §5.4): fills the guest's requests from the host's random number generator.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{
    device::{ActivateError, Activation, Device},
    queue::{DeviceQueue, QueueError},
};

const QUEUE_SIZES: [u16; 1] = [16];

/// The maximum number of bytes for one request. Drivers usually request tens of bytes; a huge request must not delay
/// the event loop.
const MAX_REQUEST_SIZE: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Rng {
    queue: Option<DeviceQueue>,
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
            // If the host's generator fails, the request returns empty and the guest retries.
            let filled = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
            let written = chain.writable.put(&bytes[..filled]);
            u32::try_from(written).unwrap_or(0)
        })
    }
}

impl Device for Rng {
    fn device_id(&self) -> u32 {
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
