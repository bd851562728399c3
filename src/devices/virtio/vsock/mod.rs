//! virtio-vsock (virtio 1.3 §5.10) with a muxer in user space: no vhost, no named socket, and no process on the host
//! can connect to the guest.
//!
//! Belongs here: the device, which moves packets between the muxer and the queues. [`packet`] is the header of a
//! packet, [`connection`] the state machine of one connection, [`muxer`] all streams of the machine.

mod connection;
#[cfg(any(test, fuzzing))]
mod fuzz;
pub(crate) mod muxer;
mod packet;

#[cfg(any(test, fuzzing))]
pub use self::fuzz::exchange_packets;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::{
    muxer::Muxer,
    packet::{HEADER_SIZE, PacketHeader},
};
use super::{
    device::{ActivateError, Activation, Device, copy_config},
    queue::{DeviceQueue, QueueError, QueueFault},
};
use crate::devices::counters::{Counters, Obstacle};

/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The maximum number of the guest's packets that are handled before the event loop continues.
const MAX_PACKETS_FROM_GUEST_PER_TURN: usize = 256;

/// The maximum number of packets to the guest before the event loop continues.
const MAX_PACKETS_TO_GUEST_PER_TURN: usize = 128;

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
        let mut budget = MAX_PACKETS_FROM_GUEST_PER_TURN;
        loop {
            transmit.pause_kicks()?;
            while let Some(mut chain) = transmit.pop()? {
                let counters = self.muxer.counters();
                counters.add_requests(1);
                let mut header = [0; HEADER_SIZE];
                let mut is_complete = false;
                if chain.readable.take(&mut header) {
                    let header = PacketHeader::parse(&header);
                    // Drop a packet whose payload is shorter than the length in its header.
                    is_complete = header.length as usize <= chain.readable.len();
                    if is_complete {
                        counters.add_bytes_from_guest(header.length.into());
                        let mut payload = chain.readable.split_to(header.length as usize);
                        self.muxer.receive(&header, &mut payload);
                    }
                }
                if !is_complete {
                    let counters = self.muxer.counters();
                    counters.add_error();
                    log::warn!(
                        target: counters.name(),
                        "queue {}: a packet of the guest is dropped: it is shorter than its header says",
                        transmit.index()
                    );
                }
                transmit.add_used(chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    // Continue from the event loop, after the other devices.
                    transmit.kick_again()?;
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
        if let Err(error) = self.muxer.poll() {
            let counters = self.muxer.counters();
            counters.add_error();
            log::warn!(
                target: counters.name(),
                "the streams of processes may stop: cannot wait for their events: {error}"
            );
        }
        self.deliver()
    }

    /// Moves packets to the guest until there are no more packets or buffers. After [`MAX_PACKETS_TO_GUEST_PER_TURN`]
    /// packets, the queue kicks itself and the call returns, so that a guest that keeps adding buffers cannot occupy
    /// the event loop. Call this after a kick of the receive queue, and after any change that may have created a
    /// packet.
    pub(crate) fn deliver(&mut self) -> Result<(), QueueError> {
        let Some(Queues { receive, .. }) = &mut self.queues else {
            return Ok(());
        };
        receive.pause_kicks()?;
        let mut packets = 0;
        while self.muxer.has_packet() {
            if packets == MAX_PACKETS_TO_GUEST_PER_TURN {
                receive.kick_again()?;
                return receive.notify_driver();
            }
            packets += 1;
            let Some(mut chain) = receive.pop()? else {
                // The guest has no buffers: enable kicks, so that it kicks when it adds some.
                if receive.resume_kicks()? {
                    receive.pause_kicks()?;
                    continue;
                }
                self.muxer.counters().wait(receive.index(), Obstacle::NoGuestBuffers);
                return receive.notify_driver();
            };
            self.muxer.counters().resume(receive.index());
            if chain.writable.len() <= HEADER_SIZE {
                return Err(receive.error(QueueFault::BufferTooSmall(chain.writable.len())));
            }
            let mut header_space = chain.writable.split_to(HEADER_SIZE);
            match self.muxer.next_packet(&chain.writable) {
                Some(header) => {
                    header_space.put(&header.to_bytes());
                    let counters = self.muxer.counters();
                    counters.add_requests(1);
                    counters.add_bytes_to_guest(header.length.into());
                    let written = u32::try_from(HEADER_SIZE).unwrap_or(0) + header.length;
                    receive.add_used(chain.head, written)?;
                }
                None => receive.undo_pop(),
            }
        }
        self.muxer.counters().resume(receive.index());
        receive.notify_driver()
    }
}

impl Device for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn counters(&self) -> Arc<Counters> {
        self.muxer.counters().clone()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(nutshell_protocol::GUEST_CID).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [receive, transmit, event] = activation.take_queues()?;
        transmit.kick_again().map_err(ActivateError::Queue)?;
        self.queues = Some(Queues {
            receive,
            transmit,
            _event: event,
        });
        Ok(())
    }

    fn reset(&mut self) {
        for queue in [0, 1, 2] {
            self.muxer.counters().resume(queue);
        }
        self.queues = None;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{
        devices::virtio::mock::{InterruptCounter, WRITE, descriptor, device_queue, memory, stall_timer},
        memory::{GuestMemory, MemoryRegions},
    };

    /// The driver's side of the three queues.
    fn queues(memory: &GuestMemory) -> [MockSplitQueue<'_, MemoryRegions>; 3] {
        [0, 0x1000, 0x2000].map(|address| MockSplitQueue::create(&**memory, GuestAddress(address), 16))
    }

    /// A running device, whose receive and transmit queue have these available indices.
    fn device(receive: u16, transmit: u16) -> Vsock {
        let memory = memory();
        let queues = queues(&memory);
        queues[0].avail().idx().store(receive);
        queues[1].avail().idx().store(transmit);
        device_with(&memory, &queues)
    }

    fn device_with(memory: &GuestMemory, queues: &[MockSplitQueue<'_, MemoryRegions>]) -> Vsock {
        let queues = queues.iter().map(|queue| device_queue(queue, memory).0);
        let mut vsock = Vsock::new(Muxer::new(&stall_timer()).unwrap());
        let activation = Activation {
            features: vsock.features(),
            queues: queues.collect(),
            interrupt: Arc::new(InterruptCounter::default()),
            memory: memory.clone(),
        };
        vsock.activate(activation).unwrap();
        vsock.muxer().open(5, None, None).unwrap();
        vsock
    }

    /// Makes the device send a packet.
    fn send_reset(vsock: &mut Vsock) -> Result<(), QueueError> {
        let mut header = PacketHeader::parse(&[0; HEADER_SIZE]);
        (header.source_cid, header.operation) = (nutshell_protocol::GUEST_CID.into(), None);
        vsock.muxer().receive(&header, &mut Default::default());
        vsock.deliver()
    }

    #[test]
    fn broken_queue_is_an_error_that_names_it() {
        for error in [
            send_reset(&mut device(17, 0)).unwrap_err(),
            device(0, 17).serve_transmit().unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.starts_with("queue 0: the virtqueue is broken"), "{text}");
        }
    }

    #[test]
    fn packets_for_a_guest_without_buffers_are_pending() {
        let mut vsock = device(0, 0);
        vsock.deliver().unwrap();
        assert_eq!(vsock.muxer().pending(), []);

        send_reset(&mut vsock).unwrap();

        assert_eq!(vsock.muxer().pending()[0].place, "queue 0");
        vsock.reset();
        assert_eq!(vsock.muxer().pending(), []);
    }

    #[test]
    fn guest_that_keeps_adding_buffers_does_not_occupy_the_event_loop() {
        let memory = memory();
        let [_, transmit, event] = queues(&memory);
        let receive = MockSplitQueue::create(&*memory, GuestAddress(0x1_0000), QUEUE_SIZES[0]);
        for slot in 0..QUEUE_SIZES[0] {
            let buffer = descriptor(0x8000, 4096, WRITE, 0);
            receive.desc_table().store(slot, buffer).unwrap();
            receive.avail().ring().ref_at(slot.into()).unwrap().store(slot);
        }
        let queues = [receive, transmit, event];
        let mut vsock = device_with(&memory, &queues);
        for _ in 0..MAX_PACKETS_TO_GUEST_PER_TURN {
            send_reset(&mut vsock).unwrap();
        }
        send_reset(&mut vsock).unwrap();
        let [receive, ..] = &queues;
        receive.avail().idx().store(QUEUE_SIZES[0]);

        for total in [MAX_PACKETS_TO_GUEST_PER_TURN, MAX_PACKETS_TO_GUEST_PER_TURN + 1] {
            vsock.deliver().unwrap();
            assert_eq!(usize::from(receive.used().idx().load()), total);
        }

        let kick = vsock.queues.as_ref().unwrap().receive.kick();
        assert_eq!(kick.read().unwrap(), 1, "the queue kicked itself once");
    }

    /// In another monitor, a device stayed silent after its guest had once had no buffer.
    #[test]
    fn packets_continue_whenever_the_guest_provides_buffers_again_cve_2020_16843() {
        let memory = memory();
        let queues = queues(&memory);
        let [receive, ..] = &queues;
        let mut vsock = device_with(&memory, &queues);
        for round in 0..40 {
            send_reset(&mut vsock).unwrap();
            assert_eq!(vsock.muxer().pending().len(), 1);
            let flags: u16 = memory.read_obj(receive.used_addr()).unwrap();
            assert_eq!(flags, 0, "the driver must kick the queue");

            let slot = round % 16;
            let buffer = descriptor(0x8000, 4096, WRITE, 0);
            receive.desc_table().store(slot, buffer).unwrap();
            receive.avail().ring().ref_at(slot.into()).unwrap().store(slot);
            receive.avail().idx().store(round + 1);
            vsock.deliver().unwrap();

            assert_eq!(receive.used().idx().load(), round + 1);
            assert_eq!(vsock.muxer().pending(), []);
        }
    }
}
