//! The thread of a queue pair. It moves packets between guest memory and the tap device without an intermediate copy.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use rustix::event::epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{
    control::ControlQueue,
    dhcp::{self, DhcpServer},
    tap::TapQueue,
};
use crate::{
    control::VNET_HEADER_SIZE,
    devices::{
        counters::{Counters, Obstacle},
        system_calls,
        virtio::{
            buffers::Buffers,
            queue::{DeviceQueue, QueueError, QueueFault},
        },
    },
    jail::seccomp,
};

/// [`VNET_HEADER_SIZE`] as a `usize`.
pub(super) const HEADER_SIZE: usize = VNET_HEADER_SIZE as usize;

/// The offset of the field `num_buffers` in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// The maximum size of a packet in bytes: vnet header, Ethernet header, and 64 KiB.
pub(super) const MAX_PACKET_SIZE: usize = HEADER_SIZE + 14 + (64 << 10);

/// The maximum number of packets that one direction moves before the other direction continues.
const MAX_PACKETS_PER_TURN: usize = 64;

#[derive(Debug)]
pub(super) struct QueuePair {
    pub(super) tap: Arc<TapQueue>,
    pub(super) receive: DeviceQueue,
    pub(super) transmit: DeviceQueue,
    /// A received packet may span several descriptor chains (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) mergeable_buffers: bool,
    /// Answers the guest's DHCP requests. `None` means that they go to the tap device.
    pub(super) dhcp: Option<Arc<DhcpServer>>,
    pub(super) counters: Arc<Counters>,
}

/// The handle of a thread. Dropping it stops and joins the thread.
#[derive(Debug)]
pub(super) struct Worker {
    stop: EventFd,
    pub(super) thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of `pair`. One worker of a device also serves its control queue, if there is one.
    pub(super) fn start(pair: QueuePair, control: Option<ControlQueue>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let (counters, receive, transmit) = (pair.counters.clone(), pair.receive.index(), pair.transmit.index());
        let thread = thread::Builder::new()
            .name("net".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                seccomp::confine_thread(&system_calls::NET);
                let ended = PacketLoop::new(pair, control).run(&stopped);
                counters.resume(receive);
                if let Err(error) = ended {
                    counters.add_error();
                    log::warn!(
                        target: counters.name(),
                        "the guest continues without the queues {receive} and {transmit}: {error}"
                    );
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The counter cannot overflow: this is the only write.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread ends the process.
            let _ = thread.join();
        }
    }
}

/// Why a worker ends before it is stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot wait for packets: {0}")]
    Wait(#[from] io::Error),
}

/// The source of an event, which is the data of its epoll entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum EventSource {
    Stop,
    Tap,
    Receive,
    Transmit,
    Control,
}

const EVENT_SOURCES: [EventSource; 5] = [
    EventSource::Stop,
    EventSource::Tap,
    EventSource::Receive,
    EventSource::Transmit,
    EventSource::Control,
];

pub(super) struct PacketLoop {
    tap: Arc<TapQueue>,
    receiver: Receiver,
    transmit: DeviceQueue,
    dhcp: Option<Arc<DhcpServer>>,
    control: Option<ControlQueue>,
    tap_watch: TapWatch,
    counters: Arc<Counters>,
}

/// The work that a loop can do without waiting.
#[derive(Debug)]
pub(super) struct Due {
    receive: bool,
    transmit: bool,
    command: bool,
}

impl Default for Due {
    /// The first turn tries both directions, because the driver may have provided buffers and packets before the thread
    /// started. The control queue waits for its kick, which stays readable in the eventfd.
    fn default() -> Self {
        Self {
            receive: true,
            transmit: true,
            command: false,
        }
    }
}

/// Whether epoll watches the tap device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TapWatch {
    /// Yes, for packets.
    Active,
    /// Yes, for one packet and for the removal of the device: the guest has no space for a packet.
    Paused,
    /// No: the device was removed, and its descriptor would always be ready.
    Removed,
}

impl PacketLoop {
    pub(super) fn new(pair: QueuePair, control: Option<ControlQueue>) -> Self {
        Self {
            tap: pair.tap,
            receiver: Receiver {
                queue: pair.receive,
                mergeable_buffers: pair.mergeable_buffers,
                space: Buffers::default(),
                chains: VecDeque::new(),
                used: Vec::new(),
                had_space: false,
                delivered: Tally::default(),
            },
            transmit: pair.transmit,
            dhcp: pair.dhcp,
            control,
            tap_watch: TapWatch::Active,
            counters: pair.counters,
        }
    }

    fn run(mut self, stop: &EventFd) -> Result<(), WorkerError> {
        let epoll = self.watch(stop)?;
        let mut due = Due::default();
        while self.turn(&epoll, &mut due)? {}
        Ok(())
    }

    /// Makes an epoll instance readable on the events of this loop.
    pub(super) fn watch(&self, stop: &EventFd) -> io::Result<OwnedFd> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let add = |source: EventSource, descriptor: BorrowedFd<'_>| {
            let data = epoll::EventData::new_u64(source as u64);
            epoll::add(&epoll, descriptor, data, epoll::EventFlags::IN).map_err(io::Error::from)
        };
        add(EventSource::Stop, borrow(stop))?;
        add(EventSource::Tap, self.tap.as_fd())?;
        add(EventSource::Receive, borrow(self.receiver.queue.kick()))?;
        add(EventSource::Transmit, borrow(self.transmit.kick()))?;
        if let Some(control) = &self.control {
            add(EventSource::Control, borrow(control.kick()))?;
        }
        Ok(epoll)
    }

    /// Does the work in `due`, waits for events if none is left, and adds their work. Returns `false` if the thread
    /// must end.
    pub(super) fn turn(&mut self, epoll: &OwnedFd, due: &mut Due) -> Result<bool, WorkerError> {
        if due.receive {
            due.receive = self.receive(epoll)?;
        }
        if due.transmit {
            due.transmit = self.transmit()?;
        }
        if due.command
            && let Some(control) = &mut self.control
        {
            due.command = control.serve()?;
        }
        let no_wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let busy = due.receive || due.transmit || due.command;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENT_SOURCES.len()];
        let events: &[epoll::Event] = match epoll::wait(epoll, events.as_mut_slice(), busy.then_some(&no_wait)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => &[],
            Err(error) => return Err(io::Error::from(error).into()),
        };
        for event in events {
            let number = event.data.u64();
            match EVENT_SOURCES.into_iter().find(|source| *source as u64 == number) {
                Some(EventSource::Stop) => return Ok(false),
                Some(EventSource::Tap) => {
                    // The device was removed (`tun_chr_poll`). epoll always reports these flags, so stop watching.
                    let flags = event.flags;
                    if flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP) {
                        epoll::delete(epoll, self.tap.as_fd()).map_err(io::Error::from)?;
                        self.tap_watch = TapWatch::Removed;
                        self.counters.add_error();
                        log::warn!(
                            target: self.counters.name(),
                            "queue {}: the tap device is gone, the guest has no network on this interface",
                            self.receiver.queue.index()
                        );
                    } else if self.tap_watch == TapWatch::Paused {
                        // Before its driver has provided the first buffers, the guest's interface is down.
                        if self.receiver.had_space {
                            self.counters
                                .wait(self.receiver.queue.index(), Obstacle::NoGuestBuffers);
                        }
                    } else {
                        due.receive = true;
                    }
                }
                Some(EventSource::Receive) => {
                    drain(self.receiver.queue.kick());
                    due.receive |= self.tap_watch == TapWatch::Paused;
                }
                Some(EventSource::Transmit) => {
                    drain(self.transmit.kick());
                    due.transmit = true;
                }
                Some(EventSource::Control) => {
                    if let Some(control) = &self.control {
                        drain(control.kick());
                        due.command = true;
                    }
                }
                None => {}
            }
        }
        Ok(true)
    }

    /// Moves packets to the guest. Returns `true` if there may be more.
    fn receive(&mut self, epoll: &OwnedFd) -> Result<bool, WorkerError> {
        if self.tap_watch == TapWatch::Removed {
            return Ok(false);
        }
        let outcome = self.receiver.receive(&self.tap, &self.counters);
        let delivered = self.receiver.announce_delivered(&self.counters)?;
        let outcome = outcome?;
        // A readable tap device must not keep this thread awake while the guest provides no buffers.
        let (tap_watch, flags) = if outcome == ReceiveOutcome::NoSpace {
            let once = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
            (TapWatch::Paused, once)
        } else {
            (TapWatch::Active, epoll::EventFlags::IN)
        };
        let progress = delivered.packets > 0;
        if progress || tap_watch == TapWatch::Active {
            self.counters.resume(self.receiver.queue.index());
        }
        if tap_watch != self.tap_watch || tap_watch == TapWatch::Paused && progress {
            let data = epoll::EventData::new_u64(EventSource::Tap as u64);
            epoll::modify(epoll, self.tap.as_fd(), data, flags).map_err(io::Error::from)?;
            self.tap_watch = tap_watch;
        }
        Ok(outcome == ReceiveOutcome::MayHaveMore)
    }

    /// Moves packets from the guest. Returns `true` if there may be more.
    fn transmit(&mut self) -> Result<bool, WorkerError> {
        let mut sent = Tally::default();
        let outcome = self.transmit_turn(&mut sent);
        self.counters.add_requests(sent.packets);
        self.counters.add_bytes_from_guest(sent.bytes);
        if self.dhcp.is_some() {
            self.receiver.announce_delivered(&self.counters)?;
        }
        outcome
    }

    fn transmit_turn(&mut self, sent: &mut Tally) -> Result<bool, WorkerError> {
        let queue = &mut self.transmit;
        queue.pause_kicks()?;
        for _ in 0..MAX_PACKETS_PER_TURN {
            let Some(chain) = queue.pop()? else {
                queue.notify_driver()?;
                return Ok(queue.resume_kicks()?);
            };
            let length = chain.readable.len();
            if (HEADER_SIZE..=MAX_PACKET_SIZE).contains(&length) && chain.writable.len() == 0 {
                if let Some(server) = &self.dhcp
                    && self.receiver.answer_dhcp(&chain.readable, server, &self.counters)?
                {
                    sent.add(length);
                    queue.add_used(chain.head, 0)?;
                    continue;
                }
                match chain.readable.write_to(self.tap.as_fd(), None) {
                    Ok(_) => sent.add(length),
                    // A packet that the host does not accept is dropped, as on any link.
                    Err(error) => {
                        self.counters.add_error();
                        log::warn!(
                            target: self.counters.name(),
                            "queue {}: a packet of the guest is dropped: cannot write to the tap device: {error}",
                            queue.index()
                        );
                    }
                }
            } else {
                self.counters.add_error();
                log::warn!(
                    target: self.counters.name(),
                    "queue {}: a packet of the guest is dropped: {}",
                    queue.index(),
                    if chain.writable.len() == 0 {
                        format!("it has {length} bytes, outside of {HEADER_SIZE} to {MAX_PACKET_SIZE}")
                    } else {
                        "its chain has writable buffers".to_owned()
                    }
                );
            }
            queue.add_used(chain.head, 0)?;
        }
        queue.notify_driver()?;
        Ok(true)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReceiveOutcome {
    /// The tap device has no packet.
    NoPacket,
    /// The guest has not provided enough buffers for a packet.
    NoSpace,
    /// [`MAX_PACKETS_PER_TURN`] packets were moved, and the tap device may have more.
    MayHaveMore,
}

/// The packets of one turn, and their bytes without vnet headers.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    packets: u64,
    bytes: u64,
}

impl Tally {
    /// Adds a packet of `length` bytes, vnet header included.
    fn add(&mut self, length: usize) {
        self.packets += 1;
        self.bytes += length.saturating_sub(HEADER_SIZE) as u64;
    }
}

/// The direction from the tap device to the guest.
struct Receiver {
    queue: DeviceQueue,
    mergeable_buffers: bool,
    /// The buffers of all chains in `chains`.
    space: Buffers<'static>,
    /// The chains that were taken from the queue but have not been used yet: the head of each, and the size of its
    /// buffers in bytes.
    chains: VecDeque<(u16, usize)>,
    /// The chains of the current packet: head and written bytes. Kept to reuse its allocation.
    used: Vec<(u16, u32)>,
    /// Whether the driver has ever provided a buffer.
    had_space: bool,
    /// The packets of the current turn.
    delivered: Tally,
}

impl Receiver {
    /// Moves packets from `tap` to the guest.
    fn receive(&mut self, tap: &TapQueue, counters: &Counters) -> Result<ReceiveOutcome, QueueError> {
        for _ in 0..MAX_PACKETS_PER_TURN {
            if !self.take_space(MAX_PACKET_SIZE)? {
                return Ok(ReceiveOutcome::NoSpace);
            }
            match self.space.read_from(tap.as_fd(), None) {
                Ok(length) => {
                    self.deliver(length)?;
                    self.delivered.add(length);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ReceiveOutcome::NoPacket),
                Err(error) => {
                    counters.add_error();
                    log::warn!(
                        target: counters.name(),
                        "queue {}: the guest receives no packet: cannot read from the tap device: {error}",
                        self.queue.index()
                    );
                    return Ok(ReceiveOutcome::NoPacket);
                }
            }
        }
        Ok(ReceiveOutcome::MayHaveMore)
    }

    /// If `packet`, a packet of the guest, is addressed to the DHCP server: passes it to `server`, and puts the answer
    /// into the guest's buffers. Returns whether the packet is for the server.
    ///
    /// The guest may change the packet meanwhile: then the server gets another frame, which it refuses, or the tap
    /// device gets a request. Neither harms the host.
    fn answer_dhcp(
        &mut self,
        packet: &Buffers<'_>,
        server: &DhcpServer,
        counters: &Counters,
    ) -> Result<bool, QueueError> {
        let mut start = [0; HEADER_SIZE + dhcp::MAX_HEADERS_SIZE];
        if !dhcp::is_for_server(copy_frame(packet, &mut start)) {
            return Ok(false);
        }
        let mut request = [0; HEADER_SIZE + dhcp::MAX_REQUEST_SIZE];
        let queue = self.queue.index();
        match server.answer(copy_frame(packet, &mut request)) {
            Ok(None) => {}
            Ok(Some(answer)) => {
                if !self.put(&answer.frame)? {
                    counters.add_error();
                    log::warn!(
                        target: counters.name(),
                        "queue {queue}: the answer to a DHCP request is dropped: the guest has provided no space for it"
                    );
                } else if !answer.incomplete_options.is_empty() {
                    counters.add_error();
                    log::warn!(
                        target: counters.name(),
                        "queue {queue}: the answer to a DHCP request has no space for all values of the options {:?}: \
                         the guest accepts only short answers",
                        answer.incomplete_options
                    );
                }
            }
            Err(error) => {
                counters.add_error();
                log::warn!(target: counters.name(), "queue {queue}: a DHCP request of the guest is dropped: {error}");
            }
        }
        Ok(true)
    }

    /// Puts an Ethernet frame into the guest's buffers. Returns `false` if the guest has provided too few.
    fn put(&mut self, frame: &[u8]) -> Result<bool, QueueError> {
        let length = HEADER_SIZE + frame.len();
        if !self.take_space(length)? || self.space.len() < length {
            return Ok(false);
        }
        let mut target = self.space.prefix(length);
        target.put(&[0; HEADER_SIZE]);
        target.put(frame);
        self.deliver(length)?;
        self.delivered.add(length);
        Ok(true)
    }

    /// Counts the packets that were delivered since the last call, and interrupts the driver for them.
    fn announce_delivered(&mut self, counters: &Counters) -> Result<Tally, QueueError> {
        let delivered = std::mem::take(&mut self.delivered);
        counters.add_requests(delivered.packets);
        counters.add_bytes_to_guest(delivered.bytes);
        self.queue.notify_driver()?;
        Ok(delivered)
    }

    /// Takes chains from the queue until their buffers have `size` bytes in total. Without mergeable buffers, one chain is
    /// enough, whatever its size.
    /// Returns `false` if the guest has provided too few.
    fn take_space(&mut self, size: usize) -> Result<bool, QueueError> {
        loop {
            let enough = if self.mergeable_buffers {
                self.space.len() >= size
            } else {
                !self.chains.is_empty()
            };
            if enough {
                return Ok(true);
            }
            match self.queue.pop()? {
                Some(chain) => {
                    self.had_space = true;
                    let size = chain.writable.len();
                    if size < HEADER_SIZE || !self.space.append(chain.writable) {
                        return Err(self.queue.error(QueueFault::BufferTooSmall(size)));
                    }
                    self.chains.push_back((chain.head, size));
                }
                None if self.queue.resume_kicks()? => {}
                None => return Ok(false),
            }
        }
    }

    /// Completes the packet of `length` bytes that was read into `space`, and returns its chains to the driver.
    fn deliver(&mut self, length: usize) -> Result<(), QueueError> {
        self.used.clear();
        let (mut remaining, mut consumed) = (length, 0);
        while remaining > 0 || self.used.is_empty() {
            let Some((head, size)) = self.chains.pop_front() else {
                break;
            };
            let part = remaining.min(size);
            // Fits: at most MAX_PACKET_SIZE.
            self.used.push((head, u32::try_from(part).unwrap_or(u32::MAX)));
            remaining -= part;
            consumed += size;
        }
        let mut packet = self.space.split_to(consumed);
        packet.split_to(NUM_BUFFERS_OFFSET);
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        packet.put(&count.to_le_bytes());
        self.queue.add_used_batch(&self.used)
    }
}

/// Copies the packet, without its vnet header, into `target`, as much of it as fits there.
fn copy_frame<'t>(packet: &Buffers<'_>, target: &'t mut [u8]) -> &'t [u8] {
    let mut prefix = packet.prefix(target.len());
    let length = prefix.len();
    // Cannot fail: the lengths are equal.
    let _ = prefix.take(&mut target[..length]);
    target[..length].get(HEADER_SIZE..).unwrap_or_default()
}

fn drain(event: &EventFd) {
    // The eventfd is readable, so this does not block. The count does not matter.
    let _ = event.read();
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
