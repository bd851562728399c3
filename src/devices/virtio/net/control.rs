//! The control queue (virtio 1.3 §5.1.6.5): how many pairs of queues are in use.

use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};
use vmm_sys_util::eventfd::EventFd;

use super::tap::Tap;
use crate::devices::virtio::{
    buffers::Chain,
    queue::{DeviceQueue, QueueError},
};

/// Answers (virtio 1.3 §5.1.6.5), whose constants are wider than the field.
const OK: u8 = 0;
const ERR: u8 = 1;

/// The queue and what it controls.
#[derive(Debug)]
pub(super) struct Control {
    queue: DeviceQueue,
    taps: Vec<Arc<Tap>>,
}

impl Control {
    /// `taps` are those of all pairs.
    pub(super) fn new(queue: DeviceQueue, taps: Vec<Arc<Tap>>) -> Self {
        Self { queue, taps }
    }

    /// The eventfd that is signalled when there is a command.
    pub(super) fn kick(&self) -> &EventFd {
        self.queue.kick()
    }

    /// Answers one command; `true` if there may be more. Each may take the host milliseconds, and a
    /// guest that has always one more must not keep its worker.
    pub(super) fn serve(&mut self) -> Result<bool, QueueError> {
        let Some(mut chain) = self.queue.pop()? else {
            return self.queue.resume_kicks();
        };
        let answer = match self.obey(&mut chain) {
            Some(()) => OK,
            None => ERR,
        };
        let written = chain.writable.put(&[answer]);
        self.queue.add_used(chain.head, u32::try_from(written).unwrap_or(0))?;
        self.queue.notify()?;
        Ok(true)
    }

    /// Class and command, then what the command takes. `None` for what cannot be done.
    fn obey(&self, chain: &mut Chain<'_>) -> Option<()> {
        let mut command = [0; 4];
        if chain.readable.len() != command.len() || !chain.readable.take(&mut command) {
            return None;
        }
        let [class, command, low, high] = command;
        if (u32::from(class), u32::from(command)) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
            return None;
        }
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if pairs == 0 || pairs > self.taps.len() {
            return None;
        }
        for (index, tap) in self.taps.iter().enumerate() {
            tap.set_attached(index < pairs).ok()?;
        }
        Some(())
    }
}
