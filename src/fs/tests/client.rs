//! A guest's FUSE client in a few lines: one request at a time over a real virtqueue, to a real file
//! server, through the vhost-user protocol (numbers: include/uapi/linux/fuse.h, protocol 7.38).

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: u64 = 4 << 20;
const QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;
const ANSWER_SIZE: u32 = 0x10_2000;

/// The root's node id.
pub(crate) const ROOT: u64 = 1;

/// An open file may keep what is cached of it (`FOPEN_KEEP_CACHE`).
pub(crate) const KEEP_CACHE: u32 = 1 << 1;

/// A user and group of the guest.
pub(crate) type Ids = (u32, u32);

/// The guest's root.
pub(crate) const BY_ROOT: Ids = (0, 0);

/// The connection to a file server.
pub(crate) struct Client {
    _frontend: Frontend,
    connection: UnixStream,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    next: u16,
    ids: Ids,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    pub(crate) id: u64,
    pub(crate) ttl: u64,
    pub(crate) attr: Attr,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Attr {
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: u32,
    pub(crate) flags: u32,
}

/// An error number.
pub(crate) type Failed = i32;

/// Bytes of a request.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u32s(mut self, values: &[u32]) -> Self {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    fn u64s(mut self, values: &[u64]) -> Self {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(&[0])
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

impl Attr {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            size: u64_at(bytes, 8),
            mode: u32_at(bytes, 60),
            uid: u32_at(bytes, 68),
            gid: u32_at(bytes, 72),
            rdev: u32_at(bytes, 76),
            flags: u32_at(bytes, 84),
        }
    }
}

impl Node {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            id: u64_at(bytes, 0),
            ttl: u64_at(bytes, 16),
            attr: Attr::parse(&bytes[40..128]),
        }
    }
}

impl Client {
    /// Connects as the vmm does, and starts the FUSE session as the guest's kernel does.
    pub(crate) fn connect(socket: OwnedFd) -> Self {
        let mut client = Self::without_session(socket);
        // ATOMIC_O_TRUNC, BIG_WRITES, CACHE_SYMLINKS, SUBMOUNTS, HANDLE_KILLPRIV_V2, INIT_EXT.
        let flags = 1 << 3 | 1 << 5 | 1 << 23 | 1 << 27 | 1 << 28 | 1 << 30;
        let init = Body::default().u32s(&[7, 38, 0, flags, 0]).u32s(&[0; 11]);
        let answer = client.call(26, 0, init).unwrap();
        let needed = 1 << 23 | 1 << 28;
        assert_eq!(u32_at(&answer, 12) & needed, needed, "accepted");
        client
    }

    fn without_session(socket: OwnedFd) -> Self {
        let connection = UnixStream::from(socket);
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, MEMORY).unwrap();
        let range = (
            GuestAddress(0),
            usize::try_from(MEMORY).unwrap(),
            Some(FileOffset::new(file, 0)),
        );
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
        let mut frontend = Frontend::from_stream(connection.try_clone().unwrap(), 2);
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());

        frontend.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_ne!(frontend.get_features().unwrap() & protocol, 0);
        frontend.set_features(1 << VIRTIO_F_VERSION_1 | protocol).unwrap();
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(VhostUserProtocolFeatures::MQ).unwrap();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
            .collect();
        frontend.set_mem_table(&regions).unwrap();
        let base = memory.iter().next().unwrap().as_ptr().addr() as u64;
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: base + DESCRIPTORS,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_num(QUEUE, QUEUE_SIZE).unwrap();
        frontend.set_vring_addr(QUEUE, &config).unwrap();
        frontend.set_vring_base(QUEUE, 0).unwrap();
        frontend.set_vring_call(QUEUE, &call).unwrap();
        frontend.set_vring_kick(QUEUE, &kick).unwrap();
        frontend.set_vring_enable(QUEUE, true).unwrap();
        Self {
            _frontend: frontend,
            connection,
            memory,
            kick,
            call,
            next: 0,
            ids: BY_ROOT,
        }
    }

    /// Sends the next requests as these ids.
    pub(crate) fn by(&mut self, ids: Ids) -> &mut Self {
        self.ids = ids;
        self
    }

    /// Puts one descriptor chain into the queue: `request`, then `room` bytes for an answer, and
    /// waits until it is used. Returns what was written.
    pub(crate) fn exchange(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        let (next, write) = (1_u16, 2_u16);
        self.descriptor(0, REQUEST, length, if room > 0 { next } else { 0 });
        self.descriptor(1, ANSWER, room, write);
        let slot = u64::from(self.next % QUEUE_SIZE);
        self.put(AVAILABLE + 4 + 2 * slot, 0_u16);
        self.next = self.next.wrapping_add(1);
        self.put(AVAILABLE + 2, self.next);
        self.kick.write(1).unwrap();
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != self.next {
            self.wait();
        }
        let written: u32 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap();
        let mut answer = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        answer
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16) {
        let at = DESCRIPTORS + 16 * index;
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, 1_u16);
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn wait(&self) {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut events = [
            PollFd::new(&call, PollFlags::IN),
            PollFd::new(&self.connection, PollFlags::IN),
        ];
        poll(&mut events, None).unwrap();
        assert!(events[1].revents().is_empty(), "the file server hung up");
        self.call.read().unwrap();
    }

    /// Waits until the server closes the connection.
    pub(crate) fn wait_for_end(mut self) {
        drop(self._frontend);
        let mut rest = Vec::new();
        self.connection.read_to_end(&mut rest).unwrap();
    }

    /// A request of operation `opcode`, as the guest's kernel frames it.
    pub(crate) fn frame(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + body.len()).unwrap();
        Body::default()
            .u32s(&[length, opcode])
            .u64s(&[77, node])
            .u32s(&[self.ids.0, self.ids.1, 1, 0])
            .bytes(body)
            .0
    }

    fn call(&mut self, opcode: u32, node: u64, body: Body) -> Result<Vec<u8>, Failed> {
        self.call_with_room(opcode, node, body, ANSWER_SIZE)
    }

    fn call_with_room(&mut self, opcode: u32, node: u64, body: Body, room: u32) -> Result<Vec<u8>, Failed> {
        let request = self.frame(opcode, node, &body.0);
        let answer = self.exchange(&request, room);
        assert_eq!(u64_at(&answer, 8), 77, "the answer to this request");
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Node, Failed> {
        self.call(1, parent, Body::default().name(name))
            .map(|answer| Node::parse(&answer))
    }

    /// Looks up each name below the one before.
    pub(crate) fn walk(&mut self, path: &str) -> Result<Node, Failed> {
        let mut node = self.lookup(ROOT, path.split('/').next().unwrap())?;
        for name in path.split('/').skip(1) {
            node = self.lookup(node.id, name)?;
        }
        Ok(node)
    }

    pub(crate) fn forget(&mut self, node: u64, count: u64) {
        let request = self.frame(2, node, &count.to_le_bytes());
        assert_eq!(self.exchange(&request, 0), b"");
    }

    pub(crate) fn attr(&mut self, node: u64) -> Result<Attr, Failed> {
        self.call(3, node, Body::default().u32s(&[0, 0]).u64s(&[0]))
            .map(|answer| Attr::parse(&answer[16..]))
    }

    pub(crate) fn set_owner(&mut self, node: u64, (uid, gid): Ids) -> Result<Attr, Failed> {
        self.set_attr(node, 1 << 1 | 1 << 2, 0, 0, (uid, gid))
    }

    pub(crate) fn set_mode(&mut self, node: u64, mode: u32) -> Result<Attr, Failed> {
        self.set_attr(node, 1, 0, mode, BY_ROOT)
    }

    pub(crate) fn truncate(&mut self, node: u64, size: u64, kill_set_id: bool) -> Result<Attr, Failed> {
        let valid = 1 << 3 | u32::from(kill_set_id) << 11;
        self.set_attr(node, valid, size, 0, BY_ROOT)
    }

    fn set_attr(&mut self, node: u64, valid: u32, size: u64, mode: u32, ids: Ids) -> Result<Attr, Failed> {
        let body = Body::default()
            .u32s(&[valid, 0])
            .u64s(&[0, size, 0, 0, 0, 0])
            .u32s(&[0, 0, 0, mode, 0, ids.0, ids.1, 0]);
        self.call(4, node, body).map(|answer| Attr::parse(&answer[16..]))
    }

    pub(crate) fn readlink(&mut self, node: u64) -> Result<String, Failed> {
        self.call(5, node, Body::default())
            .map(|answer| String::from_utf8(answer).unwrap())
    }

    pub(crate) fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Node, Failed> {
        self.call(6, parent, Body::default().name(name).name(target))
            .map(|answer| Node::parse(&answer))
    }

    pub(crate) fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Result<Node, Failed> {
        self.call(8, parent, Body::default().u32s(&[mode, device, 0, 0]).name(name))
            .map(|answer| Node::parse(&answer))
    }

    pub(crate) fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Node, Failed> {
        self.call(9, parent, Body::default().u32s(&[mode, 0]).name(name))
            .map(|answer| Node::parse(&answer))
    }

    pub(crate) fn unlink(&mut self, parent: u64, name: &str) -> Result<(), Failed> {
        self.call(10, parent, Body::default().name(name)).map(drop)
    }

    pub(crate) fn rename(&mut self, from: u64, old: &str, to: u64, new: &str) -> Result<(), Failed> {
        self.call(12, from, Body::default().u64s(&[to]).name(old).name(new))
            .map(drop)
    }

    pub(crate) fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Node, Failed> {
        self.call(13, parent, Body::default().u64s(&[node]).name(name))
            .map(|answer| Node::parse(&answer))
    }

    /// Returns the handle and how the file may be cached.
    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), Failed> {
        self.call(14, node, Body::default().u32s(&[flags.cast_unsigned(), 0]))
            .map(|answer| (u64_at(&answer, 0), u32_at(&answer, 8)))
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<(), Failed> {
        self.call(18, node, Body::default().u64s(&[handle]).u32s(&[0, 0]).u64s(&[0]))
            .map(drop)
    }

    pub(crate) fn fsync(&mut self, node: u64, handle: u64) -> Result<(), Failed> {
        self.call(20, node, Body::default().u64s(&[handle]).u32s(&[0, 0]))
            .map(drop)
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64, size: u32) -> Result<Vec<u8>, Failed> {
        let body = Body::default()
            .u64s(&[handle, 0])
            .u32s(&[size, 0])
            .u64s(&[0])
            .u32s(&[0, 0]);
        // The server reads as much as there is room for.
        self.call_with_room(15, node, body, 16 + size)
    }

    pub(crate) fn write(&mut self, node: u64, handle: u64, data: &[u8], kill_set_id: bool) -> Result<u32, Failed> {
        let size = u32::try_from(data.len()).unwrap();
        let body = Body::default()
            .u64s(&[handle, 0])
            .u32s(&[size, u32::from(kill_set_id) << 2])
            .u64s(&[0])
            .u32s(&[0, 0])
            .bytes(data);
        self.call(16, node, body).map(|answer| u32_at(&answer, 0))
    }

    pub(crate) fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(Node, u64), Failed> {
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL).cast_unsigned();
        let body = Body::default().u32s(&[flags, libc::S_IFREG | mode, 0, 0]).name(name);
        self.call(35, parent, body)
            .map(|answer| (Node::parse(&answer), u64_at(&answer, 128)))
    }

    pub(crate) fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), Failed> {
        let size = u32::try_from(value.len()).unwrap();
        self.call(21, node, Body::default().u32s(&[size, 0]).name(name).bytes(value))
            .map(drop)
    }

    pub(crate) fn getxattr(&mut self, node: u64, name: &str) -> Result<Vec<u8>, Failed> {
        self.call(22, node, Body::default().u32s(&[4096, 0]).name(name))
    }

    /// The names in a directory.
    pub(crate) fn list(&mut self, node: u64) -> Result<Vec<String>, Failed> {
        let opened = self.call(27, node, Body::default().u32s(&[0, 0]))?;
        let body = Body::default()
            .u64s(&[u64_at(&opened, 0), 0])
            .u32s(&[65536, 0])
            .u64s(&[0])
            .u32s(&[0, 0]);
        let answer = self.call(28, node, body)?;
        let mut names = Vec::new();
        let mut rest = answer.as_slice();
        while rest.len() >= 24 {
            let length = usize::try_from(u32_at(rest, 16)).unwrap();
            names.push(String::from_utf8(rest[24..24 + length].to_vec()).unwrap());
            rest = &rest[(24 + length).next_multiple_of(8).min(rest.len())..];
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}
