//! Which connection a packet belongs to, which connection has a packet, and the one epoll instance
//! that watches the descriptors of all of them.
//!
//! Only the guest opens connections, and only to a port that the shim opened a stream for, once:
//! so the guest decides neither how many connections there are nor what they reach.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nutshell_protocol::{GUEST_CID, HOST_CID};
use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
};

use super::{
    connection::{Connection, Fate, Key},
    packet::{Operation, Packet, STREAM},
};
use crate::devices::virtio::buffers::Buffers;

/// How many RESETs are kept for a guest that sends to nowhere and takes nothing; more are dropped.
const MAX_RESETS: usize = 256;

/// How many events are taken from the kernel at once.
const EVENTS: usize = 32;

/// What the shim is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StreamNotice {
    /// What [`Muxer::drain`] asked for has been delivered, or the stream is closed.
    Drained(u32),
    /// The stream is over.
    Closed(u32),
}

/// A stream that the guest has not connected to yet.
#[derive(Debug)]
struct Waiting {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// Names the connection in epoll; never used twice, so that a late event finds nothing.
    token: u64,
    /// Say [`StreamNotice::Drained`] at this count.
    drain: Option<u64>,
}

/// All streams of a machine.
#[derive(Debug)]
pub(crate) struct Muxer {
    epoll: OwnedFd,
    waiting: HashMap<u32, Waiting>,
    /// Drains asked for before the guest connected.
    early_drains: HashMap<u32, u64>,
    entries: HashMap<Key, Entry>,
    tokens: HashMap<u64, Key>,
    ports: HashMap<u32, Key>,
    next_token: u64,
    /// Connections with a packet, in the order that they are served; each at most once.
    ready: VecDeque<Key>,
    queued: HashSet<Key>,
    resets: VecDeque<Key>,
    notices: Vec<StreamNotice>,
}

impl Muxer {
    /// A muxer without streams.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            waiting: HashMap::new(),
            early_drains: HashMap::new(),
            entries: HashMap::new(),
            tokens: HashMap::new(),
            ports: HashMap::new(),
            next_token: 0,
            ready: VecDeque::new(),
            queued: HashSet::new(),
            resets: VecDeque::new(),
            notices: Vec::new(),
        })
    }

    /// Readable when [`Self::poll`] has something to do.
    pub(crate) fn poller(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Lets the guest connect to `port` once. The descriptors become non-blocking.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if the port has a stream.
    pub(crate) fn open(&mut self, port: u32, input: Option<OwnedFd>, output: Option<OwnedFd>) -> io::Result<()> {
        if self.waiting.contains_key(&port) || self.ports.contains_key(&port) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for descriptor in input.iter().chain(&output) {
            fcntl_setfl(descriptor, fcntl_getfl(descriptor)? | OFlags::NONBLOCK)?;
        }
        self.waiting.insert(port, Waiting { input, output });
        Ok(())
    }

    /// Asks for [`StreamNotice::Drained`] once `bytes` were delivered on `port`.
    pub(crate) fn drain(&mut self, port: u32, bytes: u64) {
        if self.waiting.contains_key(&port) && bytes > 0 {
            self.early_drains.insert(port, bytes);
            return;
        }
        let entry = self.ports.get(&port).and_then(|key| self.entries.get_mut(key));
        match entry {
            Some(entry) if entry.connection.delivered() < bytes => entry.drain = Some(bytes),
            _ => self.notices.push(StreamNotice::Drained(port)),
        }
    }

    /// Ends a stream at once.
    pub(crate) fn close(&mut self, port: u32) {
        if self.waiting.remove(&port).is_some() {
            if self.early_drains.remove(&port).is_some() {
                self.notices.push(StreamNotice::Drained(port));
            }
            self.notices.push(StreamNotice::Closed(port));
        } else if let Some(key) = self.ports.get(&port).copied() {
            self.end(key, true);
        }
    }

    /// What happened since the last call.
    pub(crate) fn take_notices(&mut self) -> Vec<StreamNotice> {
        std::mem::take(&mut self.notices)
    }

    /// Takes a packet of the guest.
    pub(crate) fn receive(&mut self, packet: &Packet, payload: &mut Buffers<'_>) {
        if packet.source_cid != u64::from(GUEST_CID) {
            // Nobody to answer to (virtio 1.3 §5.10.6.4.1).
            return;
        }
        let key = Key {
            guest: packet.source_port,
            host: packet.destination_port,
        };
        let for_us = packet.destination_cid == u64::from(HOST_CID) && packet.kind == STREAM;
        if for_us && let Some(entry) = self.entries.get_mut(&key) {
            let fate = entry.connection.receive(packet, payload);
            self.settle(key, fate);
        } else if for_us
            && packet.operation == Some(Operation::Request)
            && let Some(waiting) = self.waiting.remove(&packet.destination_port)
        {
            if self.connect(packet, key, waiting).is_err() {
                self.ports.remove(&key.host);
                self.notices.push(StreamNotice::Closed(key.host));
                self.reset(key);
            }
        } else if packet.operation != Some(Operation::Reset) {
            self.reset(key);
        }
    }

    /// Looks at the descriptors that are ready.
    pub(crate) fn poll(&mut self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec::default()))?;
        for event in events {
            let data = event.data.u64();
            let (token, output) = (data >> 1, data & 1 != 0);
            let Some(&key) = self.tokens.get(&token) else {
                continue;
            };
            let Some(entry) = self.entries.get_mut(&key) else {
                continue;
            };
            let fate = if output {
                entry.connection.output_ready()
            } else {
                entry.connection.input_ready();
                Fate::Alive
            };
            self.settle(key, fate);
        }
        Ok(())
    }

    /// Whether there is a packet for the guest.
    pub(crate) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, its payload read into `room`.
    pub(crate) fn send(&mut self, room: &Buffers<'_>) -> Option<Packet> {
        if let Some(key) = self.resets.pop_front() {
            return Some(Packet {
                source_cid: HOST_CID.into(),
                destination_cid: GUEST_CID.into(),
                source_port: key.host,
                destination_port: key.guest,
                length: 0,
                kind: STREAM,
                operation: Some(Operation::Reset),
                flags: 0,
                buffer: 0,
                forwarded: 0,
            });
        }
        while let Some(key) = self.ready.pop_front() {
            self.queued.remove(&key);
            let Some(entry) = self.entries.get_mut(&key) else {
                continue;
            };
            let packet = entry.connection.send(room);
            self.settle(key, Fate::Alive);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    fn connect(&mut self, request: &Packet, key: Key, waiting: Waiting) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        let connection = Connection::accept(request, waiting.input, waiting.output);
        let edge = epoll::EventFlags::ET;
        if let Some(input) = connection.input() {
            let data = epoll::EventData::new_u64(token << 1);
            let interest = edge | epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            watch(&self.epoll, input, data, interest)?;
        }
        if let Some(output) = connection.output() {
            let data = epoll::EventData::new_u64(token << 1 | 1);
            watch(&self.epoll, output, data, edge | epoll::EventFlags::OUT)?;
        }
        let drain = self.early_drains.remove(&key.host);
        self.tokens.insert(token, key);
        self.ports.insert(key.host, key);
        self.entries.insert(
            key,
            Entry {
                connection,
                token,
                drain,
            },
        );
        self.settle(key, Fate::Alive);
        Ok(())
    }

    /// After anything happened to a connection: forget it, queue it, or report its drain.
    fn settle(&mut self, key: Key, fate: Fate) {
        if let Fate::Over { tell_guest } = fate {
            self.end(key, tell_guest);
            return;
        }
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        if entry.drain.is_some_and(|bytes| entry.connection.delivered() >= bytes) {
            entry.drain = None;
            self.notices.push(StreamNotice::Drained(key.host));
        }
        if entry.connection.has_packet() && self.queued.insert(key) {
            self.ready.push_back(key);
        }
    }

    fn end(&mut self, key: Key, tell_guest: bool) {
        if let Some(entry) = self.entries.remove(&key) {
            self.tokens.remove(&entry.token);
            self.ports.remove(&key.host);
            if entry.drain.is_some() {
                self.notices.push(StreamNotice::Drained(key.host));
            }
            self.notices.push(StreamNotice::Closed(key.host));
            if tell_guest {
                self.reset(key);
            }
        }
    }

    fn reset(&mut self, key: Key) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }
}

/// Watches a descriptor; a regular file is always ready and cannot be watched.
fn watch(
    epoll: &OwnedFd,
    descriptor: BorrowedFd<'_>,
    data: epoll::EventData,
    interest: epoll::EventFlags,
) -> io::Result<()> {
    match epoll::add(epoll, descriptor, data, interest) {
        Err(rustix::io::Errno::PERM) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
#[path = "muxer_tests.rs"]
mod tests;
