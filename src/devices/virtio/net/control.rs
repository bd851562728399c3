//! The control queue (virtio 1.3 §5.1.6.5): sets the number of active queue pairs.

use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};
use vmm_sys_util::eventfd::EventFd;

use super::tap::TapQueue;
use crate::devices::virtio::{
    buffers::Chain,
    queue::{DeviceQueue, QueueError},
};

/// VIRTIO_NET_OK and VIRTIO_NET_ERR (virtio 1.3 §5.1.6.5). The constants of `virtio_bindings` are wider than the field.
const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

#[derive(Debug)]
pub(super) struct ControlQueue {
    queue: DeviceQueue,
    tap_queues: Vec<Arc<TapQueue>>,
}

impl ControlQueue {
    /// `tap_queues` are the queues of the tap device, one for each queue pair.
    pub(super) fn new(queue: DeviceQueue, tap_queues: Vec<Arc<TapQueue>>) -> Self {
        Self { queue, tap_queues }
    }

    /// The eventfd that is signalled when there is a command.
    pub(super) fn kick(&self) -> &EventFd {
        self.queue.kick()
    }

    /// Executes one command; returns `true` if there may be more. It does not loop: a command may take milliseconds on
    /// the host, and a guest that keeps sending commands must not occupy the worker.
    pub(super) fn serve(&mut self) -> Result<bool, QueueError> {
        let Some(mut chain) = self.queue.pop()? else {
            return self.queue.resume_kicks();
        };
        let ack = match self.execute(&mut chain) {
            Some(()) => ACK_OK,
            None => ACK_ERROR,
        };
        let written = chain.writable.put(&[ack]);
        self.queue.add_used(chain.head, u32::try_from(written).unwrap_or(0))?;
        self.queue.notify_driver()?;
        Ok(true)
    }

    /// Executes the command in `chain`: class, command, and the number of queue pairs. Returns `None` if the command is
    /// malformed, unknown, or failed.
    fn execute(&self, chain: &mut Chain<'_>) -> Option<()> {
        let mut command = [0; 4];
        if chain.readable.len() != command.len() || !chain.readable.take(&mut command) {
            return None;
        }
        let [class, command, low, high] = command;
        if (u32::from(class), u32::from(command)) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
            return None;
        }
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if pairs == 0 || pairs > self.tap_queues.len() {
            return None;
        }
        for (index, tap_queue) in self.tap_queues.iter().enumerate() {
            tap_queue.set_attached(index < pairs).ok()?;
        }
        Some(())
    }
}
