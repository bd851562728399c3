//! The control queue (virtio 1.3 §5.1.6.5): sets the number of active queue pairs.

use std::{io, sync::Arc};

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};
use vmm_sys_util::eventfd::EventFd;

use super::tap::TapQueue;
use crate::devices::{
    counters::Counters,
    virtio::{
        buffers::Chain,
        queue::{DeviceQueue, QueueError},
    },
};

/// VIRTIO_NET_OK and VIRTIO_NET_ERR (virtio 1.3 §5.1.6.5). The constants of `virtio_bindings` are wider than the field.
const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("its length is wrong")]
    Length,
    #[error("it is unknown")]
    Unknown,
    #[error("the device does not have {0} queue pairs")]
    Pairs(usize),
    #[error("cannot attach or detach a queue of the tap device: {0}")]
    Tap(#[from] io::Error),
}

#[derive(Debug)]
pub(super) struct ControlQueue {
    queue: DeviceQueue,
    tap_queues: Vec<Arc<TapQueue>>,
    counters: Arc<Counters>,
}

impl ControlQueue {
    /// `tap_queues` are the queues of the tap device, one for each queue pair.
    pub(super) fn new(queue: DeviceQueue, tap_queues: Vec<Arc<TapQueue>>, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            tap_queues,
            counters,
        }
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
            Ok(()) => ACK_OK,
            Err(error) => {
                self.counters.add_error();
                log::warn!(
                    target: self.counters.name(),
                    "queue {}: a command of the guest's driver failed: {error}",
                    self.queue.index()
                );
                ACK_ERROR
            }
        };
        let written = chain.writable.put(&[ack]);
        self.queue.add_used(chain.head, u32::try_from(written).unwrap_or(0))?;
        self.queue.notify_driver()?;
        Ok(true)
    }

    /// Executes the command in `chain`: class, command, and the number of queue pairs.
    fn execute(&self, chain: &mut Chain<'_>) -> Result<(), CommandError> {
        let mut command = [0; 4];
        if chain.readable.len() != command.len() || !chain.readable.take(&mut command) {
            return Err(CommandError::Length);
        }
        let [class, command, low, high] = command;
        if (u32::from(class), u32::from(command)) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
            return Err(CommandError::Unknown);
        }
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if pairs == 0 || pairs > self.tap_queues.len() {
            return Err(CommandError::Pairs(pairs));
        }
        for (index, tap_queue) in self.tap_queues.iter().enumerate() {
            tap_queue.set_attached(index < pairs)?;
        }
        Ok(())
    }
}
