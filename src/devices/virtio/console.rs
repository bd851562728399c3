//! virtio-console (virtio 1.3 §5.3), output only: the guest's kernel log. The host keeps its tail.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{
    device::{ActivateError, Activation, Device},
    queue::{DeviceQueue, QueueError},
};
use crate::devices::console_tail::ConsoleTail;

/// Receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [16, 16];

#[derive(Debug)]
pub(crate) struct Console {
    tail: Arc<ConsoleTail>,
    transmit: Option<DeviceQueue>,
}

impl Console {
    /// A console whose output is appended to `tail`.
    pub(crate) fn new(tail: Arc<ConsoleTail>) -> Self {
        Self { tail, transmit: None }
    }

    /// Appends the guest's output to the tail. Call this after a kick of the transmit queue.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        let mut bytes = [0; 512];
        queue.pause_kicks()?;
        queue.serve(|chain| {
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

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [_receive, transmit] = activation.take_queues()?;
        // The event loop may have consumed a kick before activation.
        let _ = transmit.kick().write(1);
        self.transmit = Some(transmit);
        Ok(())
    }

    fn reset(&mut self) {
        self.transmit = None;
    }
}
