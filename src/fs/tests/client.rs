//! A minimal FUSE client, like that in a guest. It sends requests through a real virtqueue to a real file server, over
//! the vhost-user protocol, one at a time except those that hang. Layouts and flags are those of
//! include/uapi/linux/fuse.h, protocol 7.38.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
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
use virtiofsd::fuse::Opcode;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The size of the guest's memory, in bytes.
const MEMORY: u64 = 4 << 20;

/// The index of the request queue.
const QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 16;

/// Addresses in the guest's memory: the parts of the queue, and the buffers of a request.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
const REPLY_SIZE: u32 = 0x10_2000;

/// The first of the buffers of requests that hang, and the size of each.
const HUNG: u64 = 0x38_0000;
const HUNG_SIZE: u64 = 0x1000;

/// The node id of the tree's root.
pub(crate) const ROOT: u64 = 1;

/// The guest may keep its cached contents of the opened file (`FOPEN_KEEP_CACHE`).
pub(crate) const KEEP_CACHE: u32 = 1 << 1;

/// The guest need not report the close of the opened file (`FOPEN_NOFLUSH`).
pub(crate) const NOFLUSH: u32 = 1 << 5;

/// User and group of a process in the guest.
pub(crate) type Ids = (u32, u32);

pub(crate) const BY_ROOT: Ids = (0, 0);

/// The connection to a file server.
pub(crate) struct Client {
    _frontend: Frontend,
    connection: UnixStream,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    /// The available index of the queue.
    next: u16,
    /// How many requests hang.
    hung: u16,
    ids: Ids,
}

/// The parts of `fuse_entry_out` that tests look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    pub(crate) id: u64,
    /// For how long the name may be cached.
    pub(crate) ttl: Duration,
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

pub(crate) type Errno = i32;

/// Builds the body of a request.
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
            ttl: Duration::new(u64_at(bytes, 16), u32_at(bytes, 32)),
            attr: Attr::parse(&bytes[40..128]),
        }
    }
}

impl Client {
    /// Connects like the vmm and starts a FUSE session like the guest's kernel.
    pub(crate) fn connect(socket: OwnedFd) -> Self {
        let mut client = Self::without_session(socket);
        // ATOMIC_O_TRUNC, BIG_WRITES, CACHE_SYMLINKS, SUBMOUNTS, HANDLE_KILLPRIV_V2, INIT_EXT.
        let flags = 1 << 3 | 1 << 5 | 1 << 23 | 1 << 27 | 1 << 28 | 1 << 30;
        let init = Body::default().u32s(&[7, 38, 0, flags, 0]).u32s(&[0; 11]);
        let reply = client.call(Opcode::Init, 0, init).unwrap();
        let needed = 1 << 23 | 1 << 28;
        assert_eq!(u32_at(&reply, 12) & needed, needed, "flags that the server accepted");
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
            hung: 0,
            ids: BY_ROOT,
        }
    }

    /// Sends the next requests with these ids.
    pub(crate) fn as_user(&mut self, ids: Ids) -> &mut Self {
        self.ids = ids;
        self
    }

    /// Makes one descriptor chain available, `request` and `room` bytes for a reply, and waits until it is used.
    /// Returns the bytes that were written.
    pub(crate) fn exchange(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        let (next, write) = (1_u16, 2_u16);
        self.write_descriptor(0, REQUEST, length, if room > 0 { next } else { 0 });
        self.write_descriptor(1, REPLY, room, write);
        self.make_available(0);
        let used = self.next.wrapping_sub(self.hung);
        self.wait_until_used(used);
        let slot = u64::from(used.wrapping_sub(1) % QUEUE_SIZE);
        let written: u32 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap();
        let mut reply = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        reply
    }

    /// Makes the chain of the last [`Self::exchange`] available `count` times with one notification, at most as often as
    /// the ring has entries, and waits until each is used.
    pub(crate) fn repeat_head(&mut self, count: u16) {
        for _ in 0..count {
            self.write_memory(AVAILABLE + 4 + 2 * u64::from(self.next % QUEUE_SIZE), 0_u16);
            self.next = self.next.wrapping_add(1);
        }
        self.write_memory(AVAILABLE + 2, self.next);
        self.kick.write(1).unwrap();
        self.wait_until_used(self.next);
    }

    /// Sends a lookup that hangs, and does not wait for its reply. At most seven requests can hang.
    pub(crate) fn start_hung_lookup(&mut self, parent: u64, name: &str) {
        self.start_hung(Opcode::Lookup, parent, &Body::default().name(name));
    }

    /// Sends an fsync that hangs, and does not wait for its reply. It counts towards the limit of seven.
    pub(crate) fn start_hung_fsync(&mut self, node: u64, handle: u64) {
        self.start_hung(Opcode::Fsync, node, &Body::default().u64s(&[handle]).u32s(&[0, 0]));
    }

    fn start_hung(&mut self, opcode: Opcode, node: u64, body: &Body) {
        let request = self.frame(opcode as u32, node, &body.0);
        let buffer = HUNG + 2 * HUNG_SIZE * u64::from(self.hung);
        self.memory.write_slice(&request, GuestAddress(buffer)).unwrap();
        let (head, next, write) = (2 + 2 * self.hung, 1_u16, 2_u16);
        let length = u32::try_from(request.len()).unwrap();
        self.write_descriptor_with_next(head.into(), buffer, length, next, head + 1);
        self.write_descriptor_with_next((head + 1).into(), buffer + HUNG_SIZE, 0x1000, write, 0);
        self.hung += 1;
        self.make_available(head);
    }

    /// Waits until the requests that hung are answered.
    pub(crate) fn wait_for_hung_requests(&mut self) {
        self.wait_until_used(self.next);
        self.hung = 0;
    }

    fn make_available(&mut self, head: u16) {
        self.write_memory(AVAILABLE + 4 + 2 * u64::from(self.next % QUEUE_SIZE), head);
        self.next = self.next.wrapping_add(1);
        self.write_memory(AVAILABLE + 2, self.next);
        self.kick.write(1).unwrap();
    }

    fn wait_until_used(&self, index: u16) {
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != index {
            self.wait();
        }
    }

    /// Sets the available index to a value that no driver may use, and waits until the server has received the kick.
    pub(crate) fn break_available_index(&mut self) {
        self.write_memory(AVAILABLE + 2, self.next.wrapping_add(QUEUE_SIZE + 1));
        self.notify_and_wait_for_receipt();
    }

    /// Makes a chain available whose head is beyond the descriptor table, and waits until the server has received the
    /// kick.
    pub(crate) fn send_head_beyond_the_table(&mut self) {
        self.write_memory(AVAILABLE + 4 + 2 * u64::from(self.next % QUEUE_SIZE), QUEUE_SIZE);
        self.write_memory(AVAILABLE + 2, self.next.wrapping_add(1));
        self.notify_and_wait_for_receipt();
    }

    fn notify_and_wait_for_receipt(&self) {
        self.kick.write(1).unwrap();
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        let kick = unsafe { BorrowedFd::borrow_raw(self.kick.as_raw_fd()) };
        let is_pending = || poll(&mut [PollFd::new(&kick, PollFlags::IN)], Some(&Timespec::default())).unwrap() > 0;
        while is_pending() {
            std::thread::yield_now();
        }
    }

    fn write_descriptor(&self, index: u64, address: u64, length: u32, flags: u16) {
        self.write_descriptor_with_next(index, address, length, flags, 1);
    }

    fn write_descriptor_with_next(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + 16 * index;
        self.write_memory(at, address);
        self.write_memory(at + 8, length);
        self.write_memory(at + 12, flags);
        self.write_memory(at + 14, next);
    }

    fn write_memory<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
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
        assert!(events[1].revents().is_empty(), "the file server closed the connection");
        self.call.read().unwrap();
    }

    /// Waits until the server closes the connection.
    pub(crate) fn wait_for_close(mut self) {
        drop(self._frontend);
        let mut rest = Vec::new();
        self.connection.read_to_end(&mut rest).unwrap();
    }

    /// A request with its header.
    pub(crate) fn frame(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + body.len()).unwrap();
        Body::default()
            .u32s(&[length, opcode])
            .u64s(&[77, node])
            .u32s(&[self.ids.0, self.ids.1, 1, 0])
            .bytes(body)
            .0
    }

    fn call(&mut self, opcode: Opcode, node: u64, body: Body) -> Result<Vec<u8>, Errno> {
        self.call_with_room(opcode, node, body, REPLY_SIZE)
    }

    fn call_with_room(&mut self, opcode: Opcode, node: u64, body: Body, room: u32) -> Result<Vec<u8>, Errno> {
        let request = self.frame(opcode as u32, node, &body.0);
        let reply = self.exchange(&request, room);
        assert_eq!(u64_at(&reply, 8), 77, "unique id of the request");
        match i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Node, Errno> {
        self.call(Opcode::Lookup, parent, Body::default().name(name))
            .map(|reply| Node::parse(&reply))
    }

    /// Looks up each component of `path`, starting at the root.
    pub(crate) fn walk(&mut self, path: &str) -> Result<Node, Errno> {
        let mut node = self.lookup(ROOT, path.split('/').next().unwrap())?;
        for name in path.split('/').skip(1) {
            node = self.lookup(node.id, name)?;
        }
        Ok(node)
    }

    pub(crate) fn forget(&mut self, node: u64, count: u64) {
        let request = self.frame(Opcode::Forget as u32, node, &count.to_le_bytes());
        assert_eq!(self.exchange(&request, 0), b"");
    }

    pub(crate) fn attr(&mut self, node: u64) -> Result<Attr, Errno> {
        self.call(Opcode::Getattr, node, Body::default().u32s(&[0, 0]).u64s(&[0]))
            .map(|reply| Attr::parse(&reply[16..]))
    }

    pub(crate) fn set_owner(&mut self, node: u64, (uid, gid): Ids) -> Result<Attr, Errno> {
        self.set_attr(node, 1 << 1 | 1 << 2, 0, 0, (uid, gid))
    }

    pub(crate) fn set_mode(&mut self, node: u64, mode: u32) -> Result<Attr, Errno> {
        self.set_attr(node, 1, 0, mode, BY_ROOT)
    }

    pub(crate) fn truncate(&mut self, node: u64, size: u64, kill_set_id: bool) -> Result<Attr, Errno> {
        let valid = 1 << 3 | u32::from(kill_set_id) << 11;
        self.set_attr(node, valid, size, 0, BY_ROOT)
    }

    fn set_attr(&mut self, node: u64, valid: u32, size: u64, mode: u32, ids: Ids) -> Result<Attr, Errno> {
        let body = Body::default()
            .u32s(&[valid, 0])
            .u64s(&[0, size, 0, 0, 0, 0])
            .u32s(&[0, 0, 0, mode, 0, ids.0, ids.1, 0]);
        self.call(Opcode::Setattr, node, body)
            .map(|reply| Attr::parse(&reply[16..]))
    }

    pub(crate) fn readlink(&mut self, node: u64) -> Result<String, Errno> {
        self.call(Opcode::Readlink, node, Body::default())
            .map(|reply| String::from_utf8(reply).unwrap())
    }

    pub(crate) fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Node, Errno> {
        self.call(Opcode::Symlink, parent, Body::default().name(name).name(target))
            .map(|reply| Node::parse(&reply))
    }

    pub(crate) fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Result<Node, Errno> {
        self.call(
            Opcode::Mknod,
            parent,
            Body::default().u32s(&[mode, device, 0, 0]).name(name),
        )
        .map(|reply| Node::parse(&reply))
    }

    pub(crate) fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Node, Errno> {
        self.call(Opcode::Mkdir, parent, Body::default().u32s(&[mode, 0]).name(name))
            .map(|reply| Node::parse(&reply))
    }

    pub(crate) fn unlink(&mut self, parent: u64, name: &str) -> Result<(), Errno> {
        self.call(Opcode::Unlink, parent, Body::default().name(name)).map(drop)
    }

    pub(crate) fn rename(&mut self, from: u64, old: &str, to: u64, new: &str) -> Result<(), Errno> {
        self.call(Opcode::Rename, from, Body::default().u64s(&[to]).name(old).name(new))
            .map(drop)
    }

    pub(crate) fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Node, Errno> {
        self.call(Opcode::Link, parent, Body::default().u64s(&[node]).name(name))
            .map(|reply| Node::parse(&reply))
    }

    /// Returns the handle and the `FOPEN_*` flags.
    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), Errno> {
        self.call(Opcode::Open, node, Body::default().u32s(&[flags.cast_unsigned(), 0]))
            .map(|reply| (u64_at(&reply, 0), u32_at(&reply, 8)))
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<(), Errno> {
        self.call(
            Opcode::Release,
            node,
            Body::default().u64s(&[handle]).u32s(&[0, 0]).u64s(&[0]),
        )
        .map(drop)
    }

    pub(crate) fn fsync(&mut self, node: u64, handle: u64) -> Result<(), Errno> {
        self.call(Opcode::Fsync, node, Body::default().u64s(&[handle]).u32s(&[0, 0]))
            .map(drop)
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let body = Body::default()
            .u64s(&[handle, 0])
            .u32s(&[size, 0])
            .u64s(&[0])
            .u32s(&[0, 0]);
        // The server reads as many bytes as the reply has room for.
        self.call_with_room(Opcode::Read, node, body, 16 + size)
    }

    pub(crate) fn write(&mut self, node: u64, handle: u64, data: &[u8], kill_set_id: bool) -> Result<u32, Errno> {
        let size = u32::try_from(data.len()).unwrap();
        let body = Body::default()
            .u64s(&[handle, 0])
            .u32s(&[size, u32::from(kill_set_id) << 2])
            .u64s(&[0])
            .u32s(&[0, 0])
            .bytes(data);
        self.call(Opcode::Write, node, body).map(|reply| u32_at(&reply, 0))
    }

    pub(crate) fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(Node, u64), Errno> {
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL).cast_unsigned();
        let body = Body::default().u32s(&[flags, libc::S_IFREG | mode, 0, 0]).name(name);
        self.call(Opcode::Create, parent, body)
            .map(|reply| (Node::parse(&reply), u64_at(&reply, 128)))
    }

    pub(crate) fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), Errno> {
        let size = u32::try_from(value.len()).unwrap();
        self.call(
            Opcode::Setxattr,
            node,
            Body::default().u32s(&[size, 0]).name(name).bytes(value),
        )
        .map(drop)
    }

    pub(crate) fn getxattr(&mut self, node: u64, name: &str) -> Result<Vec<u8>, Errno> {
        self.call(Opcode::Getxattr, node, Body::default().u32s(&[4096, 0]).name(name))
    }

    /// The sorted names in a directory.
    pub(crate) fn list(&mut self, node: u64) -> Result<Vec<String>, Errno> {
        let opened = self.call(Opcode::Opendir, node, Body::default().u32s(&[0, 0]))?;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let body = Body::default()
                .u64s(&[u64_at(&opened, 0), offset])
                .u32s(&[65536, 0])
                .u64s(&[0])
                .u32s(&[0, 0]);
            let reply = self.call(Opcode::Readdir, node, body)?;
            if reply.is_empty() {
                break;
            }
            let mut rest = reply.as_slice();
            while rest.len() >= 24 {
                offset = u64_at(rest, 8);
                let length = usize::try_from(u32_at(rest, 16)).unwrap();
                names.push(String::from_utf8(rest[24..24 + length].to_vec()).unwrap());
                rest = &rest[(24 + length).next_multiple_of(8).min(rest.len())..];
            }
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}
