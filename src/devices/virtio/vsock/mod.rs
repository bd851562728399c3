//! virtio-vsock (virtio 1.3 §5.10) with a muxer in user space: no vhost, no named socket, and
//! nothing on the host can dial the guest.
//!
//! [`packet`] is the header, [`connection`] the state machine of one stream, [`muxer`] all streams
//! of the machine; here is the device that moves packets between the muxer and the queues.

mod connection;
pub(crate) mod muxer;
mod packet;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::{
    muxer::Muxer,
    packet::{HEADER, Packet},
};
use super::{
    ActivateError, Activation, Device, copy_config,
    queue::{DeviceQueue, QueueError},
};

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// How many packets of the guest are taken before others get their turn.
const MAX_PACKETS_PER_TURN: usize = 256;

/// The device.
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
    /// Kept: the standard has the driver fill it, and nothing that we do sends an event.
    _event: DeviceQueue,
}

impl Vsock {
    /// A device whose streams are `muxer`'s.
    pub(crate) fn new(muxer: Muxer) -> Self {
        Self { muxer, queues: None }
    }

    /// The streams, to open and close them. Call [`Self::deliver`] after.
    pub(crate) fn muxer(&mut self) -> &mut Muxer {
        &mut self.muxer
    }

    /// Takes the guest's packets; called when the transmit queue was kicked.
    pub(crate) fn transmit(&mut self) -> Result<(), QueueError> {
        let Some(Queues { transmit, .. }) = &mut self.queues else {
            return Ok(());
        };
        let mut budget = MAX_PACKETS_PER_TURN;
        loop {
            transmit.pause_kicks()?;
            while let Some(mut chain) = transmit.pop()? {
                let mut header = [0; HEADER];
                if chain.readable.take(&mut header) {
                    let packet = Packet::parse(&header);
                    // A payload shorter than its header says is a packet that never was.
                    if packet.length as usize <= chain.readable.len() {
                        let mut payload = chain.readable.split_to(packet.length as usize);
                        self.muxer.receive(&packet, &mut payload);
                    }
                }
                transmit.add_used(chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    // Come back by the event loop, after the others.
                    let _ = transmit.kick().write(1);
                    transmit.notify()?;
                    return self.deliver();
                }
            }
            transmit.notify()?;
            if !transmit.resume_kicks()? {
                return self.deliver();
            }
        }
    }

    /// Looks at the descriptors of the streams; called when the muxer's poller is readable.
    pub(crate) fn poll(&mut self) -> Result<(), QueueError> {
        // It can only fail for a broken descriptor of its own.
        let _ = self.muxer.poll();
        self.deliver()
    }

    /// Moves packets to the guest as far as it has buffers; called when the receive queue was
    /// kicked and after anything that may have made a packet.
    pub(crate) fn deliver(&mut self) -> Result<(), QueueError> {
        let Some(Queues { receive, .. }) = &mut self.queues else {
            return Ok(());
        };
        receive.pause_kicks()?;
        while self.muxer.has_packet() {
            let Some(mut chain) = receive.pop()? else {
                // Blocked on the guest's buffers: hear of the next.
                if receive.resume_kicks()? {
                    receive.pause_kicks()?;
                    continue;
                }
                break;
            };
            if chain.writable.len() <= HEADER {
                return Err(QueueError::Small(chain.writable.len()));
            }
            let mut header = chain.writable.split_to(HEADER);
            match self.muxer.send(&chain.writable) {
                Some(packet) => {
                    header.put(&packet.bytes());
                    let written = u32::try_from(HEADER).unwrap_or(0) + packet.length;
                    receive.add_used(chain.head, written)?;
                }
                None => receive.push_back(),
            }
        }
        receive.notify()
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
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
