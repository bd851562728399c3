//! The vhost-user backend: takes requests from the queues and passes them to the tree, one at a time unless one hangs.
//!
//! virtiofsd's own `VhostUserFsBackend` is not used. It ends the process at a malformed request, panics if there is no
//! room for a reply, and supports migration, which is code that a vmm under a guest's control could reach.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    cell::Cell,
    io,
    mem::offset_of,
    sync::{Arc, atomic::Ordering},
};

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
use virtiofsd_memory::{Address, Bytes, GuestAddressSpace};
use virtiofsd_queue::{DescriptorChain, QueueT};
use virtiofsd_vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

use super::{
    guest_memory::{self, Memory, MemorySnapshot},
    standby::{ServeQueue, Standby, Worker},
    sync_threads::{Refused, SyncThreads},
    system_calls,
    tree::Tree,
};
use crate::jail::seccomp;

/// The high-priority queue and one request queue (virtio 1.3 §5.11.2).
const NUM_QUEUES: usize = 2;

/// Maximum number of descriptors of a queue.
const MAX_QUEUE_SIZE: usize = 1024;

/// The operations that wait for a disk. [`SyncThreads`] handle them.
const SYNC_OPERATIONS: [Opcode; 3] = [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Syncfs];

/// Serves both queues in one thread: a request is a few system calls on files that are mostly cached, and passing it
/// to another thread would cost as much again. Only [`SYNC_OPERATIONS`] go to threads of their own, so that one
/// container's `fsync` does not delay the other containers, and other threads take over while a request hangs
/// ([`Standby`]).
pub(super) struct Backend {
    queues: Arc<Queues>,
    standby: Arc<Standby>,
}

/// What each thread needs to serve the queues.
struct Queues {
    server: Arc<Server<Tree>>,
    standby: Arc<Standby>,
    memory: Memory,
    sync_threads: SyncThreads<Request>,
}

/// A request that was taken from its queue and is not yet answered.
struct Request {
    ring: VringMutex<Memory>,
    memory: MemorySnapshot,
    chain: DescriptorChain<MemorySnapshot>,
}

/// A request whose reply is in its buffers.
struct ExecutedRequest {
    ring: VringMutex<Memory>,
    /// The first descriptor.
    head: u16,
    /// The size of the reply in bytes.
    written: u32,
}

impl Backend {
    pub(super) fn new(tree: Tree, memory: Memory) -> io::Result<Self> {
        let standby = Arc::new(Standby::new()?);
        Ok(Self {
            queues: Arc::new(Queues {
                server: Arc::new(Server::new(tree)),
                standby: standby.clone(),
                memory,
                sync_threads: SyncThreads::new(NUM_QUEUES * MAX_QUEUE_SIZE),
            }),
            standby,
        })
    }
}

impl ServeQueue for Queues {
    fn serve_queue(&self, ring: &VringMutex<Memory>, worker: &Worker) {
        let is_ready = ring.get_ref().get_queue().ready();
        if is_ready && let Err(error) = self.process_queue(ring, worker) {
            log::error!("the guest gets no more replies of the file server on one of its queues: {error}");
        }
    }
}

impl Queues {
    /// Handles all requests in the queue of `ring`, on the thread of `worker`.
    ///
    /// An invalid ring is an error: the guest then gets no more replies.
    fn process_queue(&self, ring: &VringMutex<Memory>, worker: &Worker) -> Result<(), RingError> {
        loop {
            ring.disable_notification()?;
            while let Some(request) = self.pop(ring)? {
                if let Some(request) = self.defer_sync(request)? {
                    self.standby.watch(worker, || request.execute(&self.server).reply())?;
                }
            }
            if !ring.enable_notification()? {
                return Ok(());
            }
        }
    }

    fn pop(&self, ring: &VringMutex<Memory>) -> Result<Option<Request>, RingError> {
        let mut state = ring.get_mut();
        let queue = state.get_queue_mut();
        let available = queue.avail_idx(&*self.memory.memory(), Ordering::Acquire)?.0;
        match available.wrapping_sub(queue.next_avail()) {
            0 => return Ok(None),
            count if count > queue.size() => return Err(RingError::InvalidAvailRingIndex),
            _ => {}
        }
        // Read after the available index: the buffers of the request may be in memory that was added just before the
        // request.
        let memory = self.memory.memory();
        // `None` if the entry of the ring is invalid. It stays in the ring, so trying again would not help.
        let chain = queue
            .pop_descriptor_chain(memory.clone())
            .ok_or(RingError::InvalidChain)?;
        Ok(Some(Request {
            ring: ring.clone(),
            memory,
            chain,
        }))
    }

    /// Passes one of [`SYNC_OPERATIONS`] to another thread. Returns any other request, for the caller to handle.
    /// More requests than the queues have descriptors are an error: the guest repeats descriptors that are in use.
    fn defer_sync(&self, request: Request) -> Result<Option<Request>, RingError> {
        if !request
            .opcode()
            .is_some_and(|opcode| SYNC_OPERATIONS.map(|sync| sync as u32).contains(&opcode))
        {
            return Ok(Some(request));
        }
        let server = self.server.clone();
        let prepare = || seccomp::confine_thread(&system_calls::SYNC);
        let submitted = self.sync_threads.submit(
            request,
            prepare,
            move |request| request.execute(&server),
            |executed| {
                if let Err(error) = executed.reply() {
                    log::error!("the guest gets no reply to a flush (fsync): {error}");
                }
            },
        );
        match submitted {
            Ok(()) => Ok(None),
            Err(Refused::TooMany) => Err(RingError::InvalidChain),
            Err(Refused::NoThread(request)) => Ok(Some(request)),
        }
    }
}

type RingError = virtiofsd_queue::Error;

impl Request {
    /// The operation, if the first descriptor contains it.
    fn opcode(&self) -> Option<u32> {
        let first = self.chain.clone().next()?;
        let opcode = first.addr().checked_add(offset_of!(InHeader, opcode) as u64)?;
        self.memory.read_obj(opcode).ok()
    }

    /// Does what the request says, and writes the reply into its buffers. A malformed request gets an empty reply.
    fn execute(self, server: &Server<Tree>) -> ExecutedRequest {
        let head = self.chain.head_index();
        let written = try_handle(server, &self.memory, self.chain).unwrap_or_else(|error| {
            log::error!("the guest sent a malformed request: {error}");
            0
        });
        ExecutedRequest {
            ring: self.ring,
            head,
            written,
        }
    }
}

impl ExecutedRequest {
    /// Returns the request's descriptors to the guest.
    fn reply(self) -> Result<(), RingError> {
        let mut ring = self.ring.get_mut();
        ring.add_used(self.head, self.written)?;
        if ring.needs_notification()?
            && let Err(error) = ring.signal_used_queue()
        {
            log::error!("cannot interrupt the guest: {error}");
        }
        Ok(())
    }
}

/// Limits the system calls of the calling thread, which the vhost-user daemon has started. Does so only once.
fn confine_worker() {
    thread_local! {
        static IS_CONFINED: Cell<bool> = const { Cell::new(false) };
    }
    if !IS_CONFINED.replace(true) {
        seccomp::confine_thread(&system_calls::WORKER);
    }
}

/// Returns the number of bytes written to the reply.
fn try_handle(
    server: &Server<Tree>,
    memory: &MemorySnapshot,
    chain: DescriptorChain<MemorySnapshot>,
) -> Result<u32, String> {
    let reader = Reader::new(memory, chain.clone()).map_err(|error| error.to_string())?;
    let writer = Writer::new(memory, chain).map_err(|error| error.to_string())?;
    let request: InHeader = reader.clone().read_obj().map_err(|error| format!("header: {error}"))?;
    if has_reply(request.opcode) && writer.available_bytes() < size_of::<OutHeader>() {
        return Err(format!("no room for the reply to operation {}", request.opcode));
    }
    let written = server
        .handle_message(reader, writer, None::<&mut ()>)
        .map_err(|error| format!("operation {}: {error}", request.opcode))?;
    u32::try_from(written).map_err(|error| error.to_string())
}

fn has_reply(opcode: u32) -> bool {
    const WITHOUT_REPLY: [Opcode; 4] = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt, Opcode::Destroy];
    !WITHOUT_REPLY.map(|operation| operation as u32).contains(&opcode)
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.queues.server.destroy();
    }

    // The queues have this setting already.
    fn set_event_idx(&self, _: bool) {}

    // This backend already shares the memory object that is updated.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        guest_memory::close_files(&memory.memory())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, queue: u16, _: EventSet, rings: &[VringMutex<Memory>], _: usize) -> io::Result<()> {
        confine_worker();
        self.standby.start(&self.queues, rings);
        if let Some(ring) = rings.get(usize::from(queue)) {
            self.queues.serve_queue(ring, self.standby.main());
        }
        self.standby.main_returns();
        Ok(())
    }
}
