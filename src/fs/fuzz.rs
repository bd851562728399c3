//! The entry point of the fuzz target for the connection of the file server: messages of a vmm that a guest has taken
//! over.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{
    fs::File,
    io::{ErrorKind, IoSlice, Read},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{Arc, LazyLock},
    thread,
};

use arbitrary::{Result, Unstructured};
use parking_lot::Mutex;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, memfd_create},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use vhost_user_backend::Error as DaemonError;
use virtiofsd_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{
    FsError,
    backend::{
        Backend,
        fuzz::{backend_without_sync_threads, mount_tmpfs, prepare_thread},
    },
    guest_memory::{self, Memory},
    serve,
    tree::Tree,
};

const MAX_MESSAGES: usize = 60;

/// The maximum number of files that the guest can have open.
const MAX_FILES: u64 = 60;

/// The queues in the guest's memory, and where their only request is. The vmm refers to memory by an address of its
/// own.
const MEMORY_SIZE: u64 = 0x1_0000;
const QUEUE_STRIDE: u64 = 0x1000;
const REQUEST: u64 = 0x8000;
const REPLY: u64 = 0x9000;
const VMM_ADDRESS: u64 = 0x7f00_0000_0000;
const QUEUE_SIZE: u32 = 16;

/// How long a guest waits for the answer to a request that the server may not have received.
const ANSWER_LIMIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

/// The operations of the protocol (QEMU's vhost-user specification), of which the server supports a part.
mod operation {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const LAST: u32 = 48;
}

/// The protocol's version, and the flag of a message that wants an answer.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// One server for all inputs: its threads end with the process.
struct Server {
    backend: Arc<Backend>,
    memory: Memory,
}

static SERVER: LazyLock<Mutex<Server>> = LazyLock::new(|| {
    // Each server leaves one descriptor open (vhost-user-backend, `VringEpollHandler::new`). A real process has one
    // server, and the fuzzer has one for each input.
    let raise_to = |limit| {
        let raised = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(Resource::Nofile, raised)
    };
    // Only root may raise the hard limit.
    raise_to(Some(1 << 20))
        .or_else(|_| raise_to(getrlimit(Resource::Nofile).maximum))
        .unwrap();
    let files = mount_tmpfs();
    let top = format!("/proc/self/fd/{}/.", files.as_raw_fd());
    let tree = Tree::open_at(&top, File::open("/proc/self/fd").unwrap(), MAX_FILES).unwrap();
    let memory = guest_memory::empty_memory();
    Mutex::new(Server {
        backend: Arc::new(backend_without_sync_threads(tree, memory.clone())),
        memory,
    })
});

/// Interprets `data` as messages of a vmm, with descriptors, and as kicks of its guest.
///
/// # Panics
///
/// If a thread of the server panics, or a message is refused for another reason than its contents.
pub fn serve_vmm(data: &[u8]) {
    // First: opening the tree changes the umask.
    prepare_thread();
    let server = SERVER.lock();
    // A server that cannot start closes the listener, and with it the vmm's connection.
    let name = format!("nutshell-fuzz-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let vmm = UnixStream::connect_addr(&address).unwrap();
    let (backend, memory) = (server.backend.clone(), server.memory.clone());
    let serving = thread::spawn(move || serve(backend, memory, listener));
    let mut vmm = Vmm::new(vmm);
    // The input may end anywhere.
    let _ = vmm.run(&mut Unstructured::new(data));
    vmm.finish();
    match serving.join().unwrap() {
        Ok(()) | Err(FsError::Serve(DaemonError::HandleRequest(_))) => {}
        Err(error) => panic!("{error}"),
    }
}

/// A vmm and its guest.
struct Vmm {
    socket: UnixStream,
    memory_file: File,
    memory: GuestMemoryMmap,
    kicks: [OwnedFd; 2],
    calls: [OwnedFd; 2],
}

/// A message before it is sent.
struct Message {
    operation: u32,
    flags: u32,
    body: Vec<u8>,
    descriptors: Vec<Descriptor>,
}

#[derive(Debug, Clone, Copy)]
enum Descriptor {
    Memory,
    Kick(usize),
    Call(usize),
    /// A file of another kind.
    Socket,
}

impl Vmm {
    fn new(socket: UnixStream) -> Self {
        let memory_file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        // Larger than any mapping of it. The end of a file below a mapping of it would end the server by SIGBUS, which
        // a vmm gains nothing by: it can also close the connection.
        memory_file.set_len(1 << 62).unwrap();
        let offset = FileOffset::new(memory_file.try_clone().unwrap(), 0);
        let size = usize::try_from(MEMORY_SIZE).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size, Some(offset))]).unwrap();
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        Self {
            socket,
            memory_file,
            memory,
            kicks: [event(), event()],
            calls: [event(), event()],
        }
    }

    fn run(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        self.offer_request(input)?;
        let set_up = set_up();
        let skipped = if input.ratio(1_u8, 4)? {
            input.int_in_range(0..=set_up.len())?
        } else {
            set_up.len()
        };
        for (index, mut message) in set_up.into_iter().enumerate() {
            if index == skipped {
                continue;
            }
            if input.ratio(1_u8, 64)? {
                damage(&mut message, input)?;
            }
            if !self.send(&message) {
                return Ok(());
            }
        }
        for _ in 0..MAX_MESSAGES {
            if input.is_empty() {
                break;
            }
            let queue = input.int_in_range(0..=1_usize)?;
            if input.ratio(1_u8, 4)? {
                self.kick(queue);
            } else if !self.send(&message(input)?) {
                break;
            }
        }
        Ok(())
    }

    /// Fills the queues: each has one request, with bytes of the input after a header.
    fn offer_request(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let length = input.int_in_range(0..=200_u8)?;
        let operation = u32::from(input.arbitrary::<u8>()? & 0x3f);
        let mut request = [u32::from(length) + 40, operation].map(u32::to_le_bytes).concat();
        request.extend([1_u64, 1].map(u64::to_le_bytes).concat());
        request.resize(40, 0);
        request.extend(input.bytes(usize::from(length).min(input.len()))?);
        self.write(REQUEST, &request);
        for queue in 0..2 {
            let base = queue * QUEUE_STRIDE;
            let length = u32::try_from(request.len()).unwrap();
            for (index, (address, length, flags)) in
                [(REQUEST, length, 1_u16), (REPLY, 0x1000, 2)].into_iter().enumerate()
            {
                let mut descriptor = address.to_le_bytes().to_vec();
                descriptor.extend(length.to_le_bytes());
                descriptor.extend([flags, 1].map(u16::to_le_bytes).concat());
                self.write(base + 16 * index as u64, &descriptor);
            }
            // Flags, index, and the head of a chain.
            self.write(base + 0x400, &[0_u16, 1, 0].map(u16::to_le_bytes).concat());
        }
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Kicks a queue, and waits for an answer if there may be one.
    fn kick(&self, queue: usize) {
        rustix::io::write(&self.kicks[queue], &1_u64.to_ne_bytes()).unwrap();
        let mut polled = [PollFd::new(&self.calls[queue], PollFlags::IN)];
        // The fuzzer's timer interrupts it.
        rustix::io::retry_on_intr(|| poll(&mut polled, Some(&ANSWER_LIMIT))).unwrap();
        // Not an event if the server has not answered.
        let _ = rustix::io::read(&self.calls[queue], &mut [0; 8]);
    }

    /// Sends a message. Returns false if the server has closed the connection.
    fn send(&self, message: &Message) -> bool {
        let length = u32::try_from(message.body.len()).unwrap();
        let header = [message.operation, message.flags, length]
            .map(u32::to_le_bytes)
            .concat();
        let descriptors: Vec<_> = message.descriptors.iter().map(|kind| self.descriptor(*kind)).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(&message.body)];
        sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL).is_ok()
    }

    fn descriptor(&self, kind: Descriptor) -> BorrowedFd<'_> {
        match kind {
            Descriptor::Memory => self.memory_file.as_fd(),
            Descriptor::Kick(queue) => self.kicks[queue].as_fd(),
            Descriptor::Call(queue) => self.calls[queue].as_fd(),
            Descriptor::Socket => self.socket.as_fd(),
        }
    }

    /// Ends the connection, and takes what the server has answered.
    fn finish(&mut self) {
        // The server may have closed it.
        let _ = self.socket.shutdown(Shutdown::Write);
        if let Err(error) = self.socket.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
    }
}

/// What a vmm sends until its guest can use the file system.
fn set_up() -> Vec<Message> {
    let plain = |operation, body: Vec<u8>| with_descriptors(operation, body, &[]);
    let mut table = [1_u32, 0].map(u32::to_le_bytes).concat();
    table.extend([0, MEMORY_SIZE, VMM_ADDRESS, 0].map(u64::to_le_bytes).concat());
    let mut messages = vec![
        plain(operation::SET_OWNER, Vec::new()),
        plain(operation::GET_FEATURES, Vec::new()),
        // VIRTIO_F_VERSION_1, event index, indirect descriptors, protocol features.
        plain(operation::SET_FEATURES, number(1 << 32 | 1 << 29 | 1 << 28 | 1 << 30)),
        plain(operation::GET_PROTOCOL_FEATURES, Vec::new()),
        // MQ and REPLY_ACK.
        plain(operation::SET_PROTOCOL_FEATURES, number(0b1001)),
        with_descriptors(operation::SET_MEM_TABLE, table, &[Descriptor::Memory]),
    ];
    for queue in 0..2_usize {
        let index = u32::try_from(queue).unwrap();
        let base = VMM_ADDRESS + u64::from(index) * QUEUE_STRIDE;
        let state = |value: u32| [index, value].map(u32::to_le_bytes).concat();
        let mut address = state(0);
        // Descriptors, used ring, available ring, log.
        address.extend([base, base + 0x800, base + 0x400, 0].map(u64::to_le_bytes).concat());
        messages.extend([
            plain(operation::SET_VRING_NUM, state(QUEUE_SIZE)),
            plain(operation::SET_VRING_ADDR, address),
            plain(operation::SET_VRING_BASE, state(0)),
            with_descriptors(
                operation::SET_VRING_CALL,
                number(index.into()),
                &[Descriptor::Call(queue)],
            ),
            with_descriptors(
                operation::SET_VRING_KICK,
                number(index.into()),
                &[Descriptor::Kick(queue)],
            ),
            plain(operation::SET_VRING_ENABLE, state(1)),
        ]);
    }
    messages
}

fn number(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn with_descriptors(operation: u32, body: Vec<u8>, descriptors: &[Descriptor]) -> Message {
    Message {
        operation,
        flags: VERSION,
        body,
        descriptors: descriptors.to_vec(),
    }
}

/// A message of the set-up, or of any other operation, mostly with a body of the right form.
fn message(input: &mut Unstructured<'_>) -> Result<Message> {
    let mut messages = set_up();
    let mut message = messages.swap_remove(input.int_in_range(0..=messages.len() - 1)?);
    if input.ratio(1_u8, 3)? {
        message.operation = input.int_in_range(0..=operation::LAST)?;
    }
    if input.ratio(1_u8, 4)? {
        message.flags |= NEED_REPLY;
    }
    if input.arbitrary()? {
        damage(&mut message, input)?;
    }
    Ok(message)
}

fn damage(message: &mut Message, input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=5_u8)? {
        0 => message.flags ^= 1 << input.int_in_range(0..=31_u8)?,
        1 => {
            let length = input.int_in_range(0..=message.body.len() + 40)?;
            message.body.resize(length, 0);
        }
        2 => message.descriptors.push(*input.choose(&[
            Descriptor::Memory,
            Descriptor::Kick(0),
            Descriptor::Call(1),
            Descriptor::Socket,
        ])?),
        3 => {
            message.descriptors.pop();
        }
        _ if message.body.is_empty() => {}
        4 => {
            let at = input.int_in_range(0..=message.body.len() - 1)?;
            message.body[at] = input.arbitrary()?;
        }
        _ => {
            let at = input.int_in_range(0..=(message.body.len() - 1) / 8)? * 8;
            let value = input.arbitrary::<u64>()?.to_le_bytes();
            for (byte, value) in message.body[at..].iter_mut().zip(value) {
                *byte = value;
            }
        }
    }
    Ok(())
}
