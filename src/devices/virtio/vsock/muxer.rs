//! All streams of a machine: passes each packet of the guest to its connection, selects the connection that sends the
//! next packet, and watches the descriptors of all connections in one epoll instance.
//!
//! Only the guest opens connections, and only to a host port for which the shim has opened a stream, once per stream.
//! So the guest controls neither the number of connections nor what they reach.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nutshell_protocol::{AGENT_PORT, GUEST_CID, HOST_CID, LAST_RESERVED_PORT};
use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
};

use super::{
    connection::{Connection, ConnectionKey, ConnectionStatus},
    packet::{Operation, PacketHeader, TYPE_STREAM},
};
use crate::devices::{
    counters::{Counters, Pending},
    stall_timer::StallTimer,
    virtio::buffers::Buffers,
};

/// The maximum number of RESETs that wait to be sent. It limits the memory that a guest can use up by sending packets
/// without a connection and receiving no replies; further RESETs are dropped.
const MAX_PENDING_RESETS: usize = 256;

/// The number of queues that may wait: the receive and the transmit queue.
const QUEUES: usize = 2;

/// The maximum number of events that one [`Muxer::poll`] handles.
const MAX_EVENTS_PER_POLL: usize = 32;

/// An event that the vmm reports to the shim, with the host port of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StreamNotice {
    /// The bytes of [`Muxer::drain`] are delivered, or the stream is closed.
    Drained(u32),
    Closed(u32),
}

/// A stream to which the guest has not connected yet.
#[derive(Debug)]
struct UnconnectedStream {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
}

#[derive(Debug)]
struct ConnectionEntry {
    connection: Connection,
    /// Identifies the connection in epoll. It is never reused, so a late event finds no connection.
    token: u64,
    /// The number of delivered bytes at which [`StreamNotice::Drained`] is due.
    drain: Option<u64>,
}

/// The lowest bit of an epoll entry's data: set for a connection's output, clear for its input. The other bits are the
/// connection's token.
const OUTPUT_EVENT: u64 = 1;

/// All streams of a machine.
#[derive(Debug)]
pub(crate) struct Muxer {
    epoll: OwnedFd,
    counters: Arc<Counters>,
    /// The streams to which the guest has not connected yet, by host port.
    unconnected: HashMap<u32, UnconnectedStream>,
    /// The drain requests for unconnected streams: the number of bytes, by host port.
    early_drains: HashMap<u32, u64>,
    connections: HashMap<ConnectionKey, ConnectionEntry>,
    keys_by_token: HashMap<u64, ConnectionKey>,
    keys_by_host_port: HashMap<u32, ConnectionKey>,
    next_token: u64,
    /// Connections with a packet to send, in the order in which they are served. A connection is at most once in it.
    ready: VecDeque<ConnectionKey>,
    /// The connections in `ready`, for a fast check.
    ready_set: HashSet<ConnectionKey>,
    pending_resets: VecDeque<ConnectionKey>,
    notices: Vec<StreamNotice>,
}

impl Muxer {
    /// A muxer without streams. `stall_timer` is started when data waits.
    pub(crate) fn new(stall_timer: &Arc<StallTimer>) -> io::Result<Self> {
        Ok(Self {
            counters: Counters::with_queues("vsock", QUEUES, stall_timer),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            unconnected: HashMap::new(),
            early_drains: HashMap::new(),
            connections: HashMap::new(),
            keys_by_token: HashMap::new(),
            keys_by_host_port: HashMap::new(),
            next_token: 0,
            ready: VecDeque::new(),
            ready_set: HashSet::new(),
            pending_resets: VecDeque::new(),
            notices: Vec::new(),
        })
    }

    /// What the device has done.
    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The streams whose reader on the host has not taken all data, and the queues that wait.
    pub(crate) fn pending(&self) -> Vec<Pending> {
        let mut pending = self.counters.pending();
        let waiting = self.connections.iter().filter_map(|(key, entry)| {
            let bytes = entry.connection.pending_bytes();
            (bytes > 0).then(|| Pending {
                place: format!("queue 1, stream of port {}", key.host_port),
                progress: entry.connection.delivered(),
                reason: format!(
                    "the reader of a container's output, on the host, does not read, {bytes} bytes wait: the process \
                     blocks when it writes more"
                ),
            })
        });
        pending.extend(waiting);
        pending
    }

    /// A descriptor that is readable when [`Self::poll`] has events to handle.
    pub(crate) fn poller(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Opens a stream: the guest may connect to host port `port` once. Makes the descriptors non-blocking.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if the port has a stream.
    pub(crate) fn open(&mut self, port: u32, input: Option<OwnedFd>, output: Option<OwnedFd>) -> io::Result<()> {
        if self.unconnected.contains_key(&port) || self.keys_by_host_port.contains_key(&port) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for descriptor in input.iter().chain(&output) {
            fcntl_setfl(descriptor, fcntl_getfl(descriptor)? | OFlags::NONBLOCK)?;
        }
        self.unconnected.insert(port, UnconnectedStream { input, output });
        Ok(())
    }

    /// Requests [`StreamNotice::Drained`] when `bytes` bytes in total are written to the output of `port`.
    pub(crate) fn drain(&mut self, port: u32, bytes: u64) {
        if self.unconnected.contains_key(&port) && bytes > 0 {
            self.early_drains.insert(port, bytes);
            return;
        }
        let key = self.keys_by_host_port.get(&port);
        let entry = key.and_then(|key| self.connections.get_mut(key));
        match entry {
            Some(entry) if entry.connection.delivered() < bytes => entry.drain = Some(bytes),
            _ => self.notices.push(StreamNotice::Drained(port)),
        }
    }

    /// Closes a stream at once.
    pub(crate) fn close(&mut self, port: u32) {
        if self.unconnected.remove(&port).is_some() {
            if self.early_drains.remove(&port).is_some() {
                self.notices.push(StreamNotice::Drained(port));
            }
            self.notices.push(StreamNotice::Closed(port));
        } else if let Some(key) = self.keys_by_host_port.get(&port).copied() {
            self.remove(key, true);
        }
    }

    /// Takes the notices since the last call.
    pub(crate) fn take_notices(&mut self) -> Vec<StreamNotice> {
        std::mem::take(&mut self.notices)
    }

    /// Handles a packet from the guest.
    pub(super) fn receive(&mut self, header: &PacketHeader, payload: &mut Buffers<'_>) {
        if header.source_cid != u64::from(GUEST_CID) {
            // The driver must send with its CID (virtio 1.3 §5.10.6.4.1), and there is no other CID to reply to.
            self.counters.add_error();
            log::warn!(
                target: self.counters.name(),
                "queue 1: a packet of the guest is dropped: its source is CID {}",
                header.source_cid
            );
            return;
        }
        let key = ConnectionKey {
            guest_port: header.source_port,
            host_port: header.destination_port,
        };
        let is_valid = header.destination_cid == u64::from(HOST_CID) && header.socket_type == TYPE_STREAM;
        if is_valid && let Some(entry) = self.connections.get_mut(&key) {
            let status = entry.connection.receive(header, payload);
            self.update(key, status);
        } else if is_valid
            && header.operation == Some(Operation::Request)
            && is_permitted(key)
            && let Some(stream) = self.unconnected.remove(&header.destination_port)
        {
            if let Err(error) = self.accept(header, key, stream) {
                self.counters.add_error();
                log::warn!(
                    target: self.counters.name(),
                    "queue 1: a stream of a process is closed at its start: it cannot be watched: {error}"
                );
                self.keys_by_host_port.remove(&key.host_port);
                if self.early_drains.remove(&key.host_port).is_some() {
                    self.notices.push(StreamNotice::Drained(key.host_port));
                }
                self.notices.push(StreamNotice::Closed(key.host_port));
                self.queue_reset(key);
            }
        } else if header.operation != Some(Operation::Reset) {
            self.queue_reset(key);
        }
    }

    /// Handles events of the streams' descriptors.
    pub(crate) fn poll(&mut self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(MAX_EVENTS_PER_POLL);
        epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec::default()))?;
        for event in events {
            let data = event.data.u64();
            let (token, is_output) = (data >> 1, data & OUTPUT_EVENT != 0);
            let Some(&key) = self.keys_by_token.get(&token) else {
                continue;
            };
            let Some(entry) = self.connections.get_mut(&key) else {
                continue;
            };
            let status = if is_output {
                entry.connection.flush_output()
            } else {
                entry.connection.set_input_ready();
                ConnectionStatus::Open
            };
            self.update(key, status);
        }
        Ok(())
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        !self.pending_resets.is_empty() || !self.ready.is_empty()
    }

    /// Returns the next packet for the guest and reads its payload into `space`, which must not be empty. `None` means
    /// that there is no packet after all.
    pub(super) fn next_packet(&mut self, space: &Buffers<'_>) -> Option<PacketHeader> {
        if let Some(key) = self.pending_resets.pop_front() {
            return Some(PacketHeader {
                source_cid: HOST_CID.into(),
                destination_cid: GUEST_CID.into(),
                source_port: key.host_port,
                destination_port: key.guest_port,
                length: 0,
                socket_type: TYPE_STREAM,
                operation: Some(Operation::Reset),
                flags: 0,
                buf_alloc: 0,
                fwd_cnt: 0,
            });
        }
        while let Some(key) = self.ready.pop_front() {
            self.ready_set.remove(&key);
            let Some(entry) = self.connections.get_mut(&key) else {
                continue;
            };
            let header = entry.connection.next_packet(space);
            self.update(key, ConnectionStatus::Open);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    fn accept(&mut self, request: &PacketHeader, key: ConnectionKey, stream: UnconnectedStream) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        let connection = Connection::accept(request, stream.input, stream.output);
        let edge_triggered = epoll::EventFlags::ET;
        if let Some(input) = connection.input() {
            let data = epoll::EventData::new_u64(token << 1);
            let interest = edge_triggered | epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            watch(&self.epoll, input, data, interest)?;
        }
        if let Some(output) = connection.output() {
            let data = epoll::EventData::new_u64(token << 1 | OUTPUT_EVENT);
            watch(&self.epoll, output, data, edge_triggered | epoll::EventFlags::OUT)?;
        }
        let drain = self.early_drains.remove(&key.host_port);
        self.keys_by_token.insert(token, key);
        self.keys_by_host_port.insert(key.host_port, key);
        self.connections.insert(
            key,
            ConnectionEntry {
                connection,
                token,
                drain,
            },
        );
        self.update(key, ConnectionStatus::Open);
        Ok(())
    }

    /// Updates the muxer after a connection changed: removes it if it is closed, reports its drain, and marks it as
    /// ready to send.
    fn update(&mut self, key: ConnectionKey, status: ConnectionStatus) {
        let Some(entry) = self.connections.get_mut(&key) else {
            return;
        };
        if let Some(failure) = entry.connection.take_failure() {
            self.counters.add_error();
            log::warn!(target: self.counters.name(), "stream of port {}: {failure}", key.host_port);
        }
        if let ConnectionStatus::Closed { send_reset } = status {
            self.remove(key, send_reset);
            return;
        }
        if entry.drain.is_some_and(|bytes| entry.connection.delivered() >= bytes) {
            entry.drain = None;
            self.notices.push(StreamNotice::Drained(key.host_port));
        }
        if entry.connection.pending_bytes() > 0 {
            self.counters.watch();
        }
        if entry.connection.has_packet() && self.ready_set.insert(key) {
            self.ready.push_back(key);
        }
    }

    fn remove(&mut self, key: ConnectionKey, send_reset: bool) {
        if let Some(entry) = self.connections.remove(&key) {
            self.keys_by_token.remove(&entry.token);
            self.keys_by_host_port.remove(&key.host_port);
            if entry.drain.is_some() {
                self.notices.push(StreamNotice::Drained(key.host_port));
            }
            self.notices.push(StreamNotice::Closed(key.host_port));
            if send_reset {
                self.queue_reset(key);
            }
        }
    }

    fn queue_reset(&mut self, key: ConnectionKey) {
        if self.pending_resets.len() < MAX_PENDING_RESETS {
            self.pending_resets.push_back(key);
        } else {
            self.counters.add_error();
            log::warn!(
                target: self.counters.name(),
                "queue 0: a reset is dropped: the guest does not receive the {MAX_PENDING_RESETS} before it"
            );
        }
    }
}

/// Whether the guest's process has the privileges that a connection requires: the agent is privileged.
fn is_permitted(key: ConnectionKey) -> bool {
    key.host_port != AGENT_PORT || key.guest_port <= LAST_RESERVED_PORT
}

/// Adds a descriptor to `epoll`, unless it is a regular file, which is always ready and cannot be watched.
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
mod tests;
