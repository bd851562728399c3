//! The queues: takes requests, has the tree answer them, one at a time.
//!
//! Not virtiofsd's own `VhostUserFsBackend`: that one ends the process at a malformed request,
//! panics where a reply has no room, and offers migration, which is code that a vmm in a guest's
//! hand could reach.

use std::io;

use log::error;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT, bitmap::BitmapMmapRegion};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    fuse::{InHeader, Opcode, OutHeader},
    server::Server,
};
use virtiofsd_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use virtiofsd_queue::{DescriptorChain, QueueT};
use virtiofsd_vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

use super::tree::Tree;

/// The guest's memory, as the vmm shares it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// None yet: the vmm sends it before it starts a queue.
pub(super) fn no_memory() -> Memory {
    GuestMemoryAtomic::new(GuestMemoryMmap::new())
}

type Snapshot = GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>;

/// The high-priority queue and one request queue (virtio 1.3 §5.11.2).
const QUEUES: usize = 2;

/// The most descriptors in a queue.
const QUEUE_SIZE: usize = 1024;

/// Serves both queues in one thread: a request is a few system calls on files that are mostly
/// cached, and handing it to another thread costs as much again.
pub(super) struct Backend {
    server: Server<Tree>,
    memory: Memory,
}

impl Backend {
    pub(super) fn new(tree: Tree, memory: Memory) -> Self {
        Self {
            server: Server::new(tree),
            memory,
        }
    }

    /// Answers every request that is in the queue. Stops at a ring that makes no sense: the guest
    /// then waits for answers that it has made impossible.
    fn drain(&self, queue: &mut VringState<Memory>) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            queue.disable_notification()?;
            let memory = self.memory.memory();
            while let Some(chain) = queue.get_queue_mut().pop_descriptor_chain(memory.clone()) {
                let head = chain.head_index();
                let written = self.answer(&memory, chain);
                queue.add_used(head, written)?;
                if queue.needs_notification()? {
                    queue.signal_used_queue()?;
                }
            }
            if !queue.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Answers one request and returns how many bytes it wrote; nothing where the request is not
    /// one.
    fn answer(&self, memory: &Snapshot, chain: DescriptorChain<Snapshot>) -> u32 {
        self.try_answer(memory, chain).unwrap_or_else(|error| {
            error!("the guest sent a malformed request: {error}");
            0
        })
    }

    fn try_answer(&self, memory: &Snapshot, chain: DescriptorChain<Snapshot>) -> Result<u32, String> {
        let reader = Reader::new(memory, chain.clone()).map_err(|error| error.to_string())?;
        let writer = Writer::new(memory, chain).map_err(|error| error.to_string())?;
        let request: InHeader = reader
            .clone()
            .read_obj()
            .map_err(|error| format!("its header: {error}"))?;
        if is_answered(request.opcode) && writer.available_bytes() < size_of::<OutHeader>() {
            return Err(format!("no room for the answer to operation {}", request.opcode));
        }
        let written = self
            .server
            .handle_message(reader, writer, None::<&mut ()>)
            .map_err(|error| format!("operation {}: {error}", request.opcode))?;
        u32::try_from(written).map_err(|error| error.to_string())
    }
}

fn is_answered(operation: u32) -> bool {
    const UNANSWERED: [Opcode; 4] = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt, Opcode::Destroy];
    !UNANSWERED.map(|opcode| opcode as u32).contains(&operation)
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn reset_device(&self) {
        self.server.destroy();
    }

    // The queues know it.
    fn set_event_idx(&self, _: bool) {}

    // The memory that arrives is the one that this backend was made with.
    fn update_memory(&self, _: Memory) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, queue: u16, _: EventSet, queues: &[VringMutex<Memory>], _: usize) -> io::Result<()> {
        if let Some(ring) = queues.get(usize::from(queue))
            && let Err(error) = self.drain(&mut ring.get_mut())
        {
            error!("queue {queue} is unusable: {error}");
        }
        Ok(())
    }
}
