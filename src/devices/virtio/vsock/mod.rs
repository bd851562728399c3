//! virtio-vsock (virtio 1.3 §5.10) with a muxer in user space: no vhost, no named socket, and no process on the host
//! can connect to the guest.
//!
//! Belongs here: the device, which moves packets between the muxer and the queues. [`packet`] is the header of a
//! packet, [`connection`] the state machine of one connection, [`muxer`] all streams of the machine.

mod connection;
pub(crate) mod muxer;
mod packet;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::{
    muxer::Muxer,
    packet::{HEADER_SIZE, PacketHeader},
};
use super::{
    device::{ActivateError, Activation, Device, copy_config},
    queue::{DeviceQueue, QueueError},
};

/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The maximum number of the guest's packets that are handled before the event loop continues.
const MAX_PACKETS_PER_TURN: usize = 256;

#[derive(Debug)]
pub(crate) struct Vsock {
    muxer: Muxer,
    queues: Option<Queues>,
}

#[derive(Debug)]
struct Queues {
    /// Packets to the guest.
    receive: DeviceQueue,
    /// Packets from the guest.
    transmit: DeviceQueue,
    /// The driver fills it, but this device sends no events.
    _event: DeviceQueue,
}

impl Vsock {
    pub(crate) fn new(muxer: Muxer) -> Self {
        Self { muxer, queues: None }
    }

    /// The streams. Call [`Self::deliver`] after changing them.
    pub(crate) fn muxer(&mut self) -> &mut Muxer {
        &mut self.muxer
    }

    /// Handles packets from the guest. Call this after a kick of the transmit queue.
    pub(crate) fn serve_transmit(&mut self) -> Result<(), QueueError> {
        let Some(Queues { transmit, .. }) = &mut self.queues else {
            return Ok(());
        };
        let mut budget = MAX_PACKETS_PER_TURN;
        loop {
            transmit.pause_kicks()?;
            while let Some(mut chain) = transmit.pop()? {
                let mut header = [0; HEADER_SIZE];
                if chain.readable.take(&mut header) {
                    let header = PacketHeader::parse(&header);
                    // Drop a packet whose payload is shorter than the length in its header.
                    if header.length as usize <= chain.readable.len() {
                        let mut payload = chain.readable.split_to(header.length as usize);
                        self.muxer.receive(&header, &mut payload);
                    }
                }
                transmit.add_used(chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    // Continue from the event loop, after the other devices.
                    let _ = transmit.kick().write(1);
                    transmit.notify_driver()?;
                    return self.deliver();
                }
            }
            transmit.notify_driver()?;
            if !transmit.resume_kicks()? {
                return self.deliver();
            }
        }
    }

    /// Handles events of the streams' descriptors. Call this when the muxer's poller is readable.
    pub(crate) fn serve_streams(&mut self) -> Result<(), QueueError> {
        // Fails only if the epoll descriptor itself is broken.
        let _ = self.muxer.poll();
        self.deliver()
    }

    /// Moves packets to the guest until there are no more packets or buffers. Call this after a kick of the receive
    /// queue, and after any change that may have created a packet.
    pub(crate) fn deliver(&mut self) -> Result<(), QueueError> {
        let Some(Queues { receive, .. }) = &mut self.queues else {
            return Ok(());
        };
        receive.pause_kicks()?;
        while self.muxer.has_packet() {
            let Some(mut chain) = receive.pop()? else {
                // The guest has no buffers: enable kicks, so that it kicks when it adds some.
                if receive.resume_kicks()? {
                    receive.pause_kicks()?;
                    continue;
                }
                break;
            };
            if chain.writable.len() <= HEADER_SIZE {
                return Err(QueueError::BufferTooSmall(chain.writable.len()));
            }
            let mut header_space = chain.writable.split_to(HEADER_SIZE);
            match self.muxer.next_packet(&chain.writable) {
                Some(header) => {
                    header_space.put(&header.to_bytes());
                    let written = u32::try_from(HEADER_SIZE).unwrap_or(0) + header.length;
                    receive.add_used(chain.head, written)?;
                }
                None => receive.undo_pop(),
            }
        }
        receive.notify_driver()
    }
}

impl Device for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(nutshell_protocol::GUEST_CID).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [receive, transmit, event] = activation.take_queues()?;
        let _ = transmit.kick().write(1);
        self.queues = Some(Queues {
            receive,
            transmit,
            _event: event,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = None;
    }
}
