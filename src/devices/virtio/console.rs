//! virtio-console (virtio 1.3 §5.3) for the guest's kernel log alone: it has no input, and of its
//! output only the tail is kept, for error messages.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{
    ActivateError, Activation, Device,
    queue::{DeviceQueue, QueueError},
};
use crate::control::MAX_CONSOLE_TAIL;

const QUEUE_SIZES: [u16; 2] = [16, 16];

/// The last [`MAX_CONSOLE_TAIL`] bytes of what the guest printed, from all its consoles.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<VecDeque<u8>>);

impl Log {
    /// Adds what the guest printed; the oldest bytes give way.
    pub(crate) fn append(&self, bytes: &[u8]) {
        let mut tail = self.0.lock();
        let kept = &bytes[bytes.len().saturating_sub(MAX_CONSOLE_TAIL)..];
        let surplus = (tail.len() + kept.len()).saturating_sub(MAX_CONSOLE_TAIL);
        tail.drain(..surplus);
        tail.extend(kept);
    }

    /// What is kept.
    pub(crate) fn tail(&self) -> Vec<u8> {
        self.0.lock().iter().copied().collect()
    }
}

/// The device.
#[derive(Debug)]
pub(crate) struct Console {
    log: Arc<Log>,
    transmit: Option<DeviceQueue>,
}

impl Console {
    /// A console that prints to `log`.
    pub(crate) fn new(log: Arc<Log>) -> Self {
        Self { log, transmit: None }
    }

    /// Takes what the guest printed; called when the transmit queue was kicked.
    pub(crate) fn transmit(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        let mut bytes = [0; 512];
        queue.pause_kicks()?;
        queue.serve(|chain| {
            while chain.readable.len() > 0 {
                let count = chain.readable.len().min(bytes.len());
                if chain.readable.take(&mut bytes[..count]) {
                    self.log.append(&bytes[..count]);
                }
            }
            0
        })
    }
}

impl Device for Console {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [_receive, transmit] = activation.take_queues()?;
        // A kick that came before activation was lost on the event loop.
        let _ = transmit.kick().write(1);
        self.transmit = Some(transmit);
        Ok(())
    }

    fn reset(&mut self) {
        self.transmit = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_keeps_the_tail_and_never_grows_over_its_limit() {
        let log = Log::default();
        log.append(&vec![b'a'; MAX_CONSOLE_TAIL]);
        log.append(b"the end");
        log.append(&vec![b'b'; 3 * MAX_CONSOLE_TAIL]);
        log.append(b"last words");
        let tail = log.tail();
        assert_eq!(tail.len(), MAX_CONSOLE_TAIL);
        assert!(tail.ends_with(b"blast words"));
    }
}
