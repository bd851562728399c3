//! The queues: takes requests, has the tree answer them, one at a time.
//!
//! Not virtiofsd's own `VhostUserFsBackend`: that one ends the process at a malformed request,
//! panics where a reply has no room, and offers migration, which is code that a vmm in a guest's
//! hand could reach.

use std::{
    io,
    mem::offset_of,
    sync::{
        Arc, OnceLock,
        atomic::Ordering,
        mpsc::{self, Sender},
    },
    thread,
};

use log::error;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT, bitmap::BitmapMmapRegion};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    fuse::{InHeader, Opcode, OutHeader},
    server::Server,
};
use virtiofsd_memory::{Address, Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
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
/// cached, and handing it to another thread costs as much again. Only requests that wait for a disk
/// by their meaning go to a second thread, so that one container's `fsync` is not everybody's.
pub(super) struct Backend {
    server: Arc<Server<Tree>>,
    memory: Memory,
    patient: OnceLock<Sender<Pending>>,
}

/// A request that the second thread answers.
struct Pending {
    ring: VringMutex<Memory>,
    memory: Snapshot,
    chain: DescriptorChain<Snapshot>,
}

impl Backend {
    pub(super) fn new(tree: Tree, memory: Memory) -> Self {
        Self {
            server: Arc::new(Server::new(tree)),
            memory,
            patient: OnceLock::new(),
        }
    }

    /// Answers every request that is in the queue. Stops at a ring that makes no sense: the guest
    /// then waits for answers that it has made impossible.
    fn drain(&self, ring: &VringMutex<Memory>) -> Result<(), RingError> {
        loop {
            ring.disable_notification()?;
            while let Some(pending) = self.pop(ring)? {
                if let Some(pending) = self.postpone(pending) {
                    pending.answer(&self.server)?;
                }
            }
            if !ring.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Takes the next request.
    fn pop(&self, ring: &VringMutex<Memory>) -> Result<Option<Pending>, RingError> {
        let mut state = ring.get_mut();
        let queue = state.get_queue_mut();
        if queue.avail_idx(&*self.memory.memory(), Ordering::Acquire)?.0 == queue.next_avail() {
            return Ok(None);
        }
        // After the request was seen: its buffers may lie in memory that has come just before it.
        let memory = self.memory.memory();
        let chain = queue.pop_descriptor_chain(memory.clone());
        Ok(chain.map(|chain| Pending {
            ring: ring.clone(),
            memory,
            chain,
        }))
    }

    /// Gives a request that waits by its meaning to the second thread, and any other back.
    fn postpone(&self, pending: Pending) -> Option<Pending> {
        const PATIENT: [Opcode; 3] = [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Syncfs];
        if !pending
            .operation()
            .is_some_and(|operation| PATIENT.map(|opcode| opcode as u32).contains(&operation))
        {
            return Some(pending);
        }
        let sender = self.patient.get_or_init(|| {
            let (sender, receiver) = mpsc::channel::<Pending>();
            let server = self.server.clone();
            let spawned = thread::Builder::new().name("sync".to_owned()).spawn(move || {
                for pending in receiver {
                    if let Err(error) = pending.answer(&server) {
                        error!("a queue is unusable: {error}");
                    }
                }
            });
            if let Err(error) = spawned {
                error!("no thread for fsync: {error}");
            }
            sender
        });
        // Where the thread could not be started, nobody receives: then it is answered here.
        sender.send(pending).err().map(|unsent| unsent.0)
    }
}

type RingError = virtiofsd_queue::Error;

impl Pending {
    /// Which operation it is, if that can be told from its first descriptor.
    fn operation(&self) -> Option<u32> {
        let first = self.chain.clone().next()?;
        let opcode = first.addr().checked_add(offset_of!(InHeader, opcode) as u64)?;
        self.memory.read_obj(opcode).ok()
    }

    /// Answers the request; with nothing where it is none.
    fn answer(self, server: &Server<Tree>) -> Result<(), RingError> {
        let head = self.chain.head_index();
        let written = try_answer(server, &self.memory, self.chain).unwrap_or_else(|error| {
            error!("the guest sent a malformed request: {error}");
            0
        });
        let mut ring = self.ring.get_mut();
        ring.add_used(head, written)?;
        if ring.needs_notification()?
            && let Err(error) = ring.signal_used_queue()
        {
            error!("interrupt the guest: {error}");
        }
        Ok(())
    }
}

/// Returns how many bytes were written.
fn try_answer(server: &Server<Tree>, memory: &Snapshot, chain: DescriptorChain<Snapshot>) -> Result<u32, String> {
    let reader = Reader::new(memory, chain.clone()).map_err(|error| error.to_string())?;
    let writer = Writer::new(memory, chain).map_err(|error| error.to_string())?;
    let request: InHeader = reader
        .clone()
        .read_obj()
        .map_err(|error| format!("its header: {error}"))?;
    if is_answered(request.opcode) && writer.available_bytes() < size_of::<OutHeader>() {
        return Err(format!("no room for the answer to operation {}", request.opcode));
    }
    let written = server
        .handle_message(reader, writer, None::<&mut ()>)
        .map_err(|error| format!("operation {}: {error}", request.opcode))?;
    u32::try_from(written).map_err(|error| error.to_string())
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
            && let Err(error) = self.drain(ring)
        {
            error!("queue {queue} is unusable: {error}");
        }
        Ok(())
    }
}
