//! A thread that moves the packets of a pair of queues, straight between guest memory and the tap
//! device.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    thread,
};

use rustix::{buffer::spare_capacity, event::epoll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{control::Control, tap::Tap};
use crate::devices::virtio::{
    buffers::Buffers,
    queue::{DeviceQueue, QueueError},
};

/// The bytes before a packet (`struct virtio_net_hdr_v1`, virtio 1.3 §5.1.6).
pub(super) const HEADER: usize = crate::control::VNET_HEADER_SIZE as usize;

/// Where the header says how many buffers the packet has.
const NUM_BUFFERS: usize = 10;

/// The largest packet: an Ethernet header before 64 KiB.
const MAX_PACKET: usize = HEADER + 14 + (64 << 10);

/// How many packets one direction moves before the other has its turn.
const MAX_PACKETS_PER_TURN: usize = 64;

/// What a worker works on.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) tap: Arc<Tap>,
    pub(super) receive: DeviceQueue,
    pub(super) transmit: DeviceQueue,
    /// A packet may take several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) merges: bool,
}

/// A thread; stops and is joined when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    stop: EventFd,
    pub(super) thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    /// One of the workers has the control queue.
    pub(super) fn start(pair: Pair, control: Option<Control>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = thread::Builder::new()
            .name("net".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                // A guest that breaks its queues goes on without a network.
                let _ = Moving::new(pair, control).run(&stopped);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Why a worker ends before it is stopped.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("wait for packets: {0}")]
    Wait(#[from] io::Error),
}

/// What an event is about; epoll's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Stop,
    Tap,
    Receive,
    Transmit,
    Control,
}

const SOURCES: [Source; 5] = [
    Source::Stop,
    Source::Tap,
    Source::Receive,
    Source::Transmit,
    Source::Control,
];

struct Moving {
    tap: Arc<Tap>,
    receive: Receive,
    transmit: DeviceQueue,
    control: Option<Control>,
    arrival: Arrival,
}

/// Whether the tap device is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// Until it has a packet.
    Awaited,
    /// No: there is no room for a packet.
    Full,
    /// No: it was removed, and says so for ever.
    Gone,
}

impl Moving {
    fn new(pair: Pair, control: Option<Control>) -> Self {
        Self {
            tap: pair.tap,
            receive: Receive {
                queue: pair.receive,
                merges: pair.merges,
                space: Buffers::default(),
                chains: VecDeque::new(),
                used: Vec::new(),
            },
            transmit: pair.transmit,
            control,
            arrival: Arrival::Awaited,
        }
    }

    fn run(mut self, stop: &EventFd) -> Result<(), WorkerError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let add = |source: Source, descriptor: BorrowedFd<'_>| {
            let data = epoll::EventData::new_u64(source as u64);
            epoll::add(&epoll, descriptor, data, epoll::EventFlags::IN).map_err(io::Error::from)
        };
        add(Source::Stop, borrow(stop))?;
        add(Source::Tap, self.tap.as_fd())?;
        add(Source::Receive, borrow(self.receive.queue.kick()))?;
        add(Source::Transmit, borrow(self.transmit.kick()))?;
        if let Some(control) = &self.control {
            add(Source::Control, borrow(control.kick()))?;
        }
        // Buffers may have come before the thread did.
        let (mut receives, mut transmits, mut commanded) = (true, true, false);
        let mut events: Vec<epoll::Event> = Vec::with_capacity(SOURCES.len());
        loop {
            if receives {
                receives = self.receive(&epoll)?;
            }
            if transmits {
                transmits = self.transmit()?;
            }
            if commanded && let Some(control) = &mut self.control {
                commanded = control.serve()?;
            }
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let busy = receives || transmits || commanded;
            events.clear();
            match epoll::wait(&epoll, spare_capacity(&mut events), busy.then_some(&now)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            for event in &events {
                let number = event.data.u64();
                match SOURCES.into_iter().find(|source| *source as u64 == number) {
                    Some(Source::Stop) => return Ok(()),
                    Some(Source::Tap) => {
                        // The device is no more (`tun_chr_poll`); no flag keeps epoll from saying it.
                        let flags = event.flags;
                        if flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP) {
                            epoll::delete(&epoll, self.tap.as_fd()).map_err(io::Error::from)?;
                            self.arrival = Arrival::Gone;
                        } else {
                            receives = true;
                        }
                    }
                    Some(Source::Receive) => {
                        drain(self.receive.queue.kick());
                        receives |= self.arrival == Arrival::Full;
                    }
                    Some(Source::Transmit) => {
                        drain(self.transmit.kick());
                        transmits = true;
                    }
                    Some(Source::Control) => {
                        if let Some(control) = &self.control {
                            drain(control.kick());
                            commanded = true;
                        }
                    }
                    None => {}
                }
            }
        }
    }

    /// Moves packets to the guest; `true` if there may be more.
    fn receive(&mut self, epoll: &std::os::fd::OwnedFd) -> Result<bool, WorkerError> {
        if self.arrival == Arrival::Gone {
            return Ok(false);
        }
        let outcome = self.receive.turn(&self.tap);
        self.receive.queue.notify()?;
        let outcome = outcome?;
        // A guest that gives no room must not keep this thread awake.
        let (arrival, flags) = if outcome == Outcome::Full {
            (Arrival::Full, epoll::EventFlags::empty())
        } else {
            (Arrival::Awaited, epoll::EventFlags::IN)
        };
        if arrival != self.arrival {
            let data = epoll::EventData::new_u64(Source::Tap as u64);
            epoll::modify(epoll, self.tap.as_fd(), data, flags).map_err(io::Error::from)?;
            self.arrival = arrival;
        }
        Ok(outcome == Outcome::More)
    }

    /// Moves packets of the guest; `true` if there are more.
    fn transmit(&mut self) -> Result<bool, WorkerError> {
        let queue = &mut self.transmit;
        queue.pause_kicks()?;
        for _ in 0..MAX_PACKETS_PER_TURN {
            let Some(chain) = queue.pop()? else {
                queue.notify()?;
                return Ok(queue.resume_kicks()?);
            };
            let length = chain.readable.len();
            if (HEADER..=MAX_PACKET).contains(&length) && chain.writable.len() == 0 {
                // A packet that the host cannot take is lost, as on any link.
                let _ = chain.readable.write_to(self.tap.as_fd(), None);
            }
            queue.add_used(chain.head, 0)?;
        }
        queue.notify()?;
        Ok(true)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The tap device has no packet.
    Empty,
    /// The guest has no room.
    Full,
    /// There may be more.
    More,
}

/// Packets on their way to the guest.
struct Receive {
    queue: DeviceQueue,
    merges: bool,
    /// Room of chains that were taken, in their order.
    space: Buffers<'static>,
    /// Those chains and how much room each has.
    chains: VecDeque<(u16, usize)>,
    used: Vec<(u16, u32)>,
}

impl Receive {
    fn turn(&mut self, tap: &Tap) -> Result<Outcome, QueueError> {
        for _ in 0..MAX_PACKETS_PER_TURN {
            if !self.has_room()? {
                return Ok(Outcome::Full);
            }
            match self.space.read_from(tap.as_fd(), None) {
                Ok(length) => self.deliver(length)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing there, or the device is gone, which epoll says.
                Err(_) => return Ok(Outcome::Empty),
            }
        }
        Ok(Outcome::More)
    }

    /// Takes chains until any packet fits; `false` if the guest has given too few.
    fn has_room(&mut self) -> Result<bool, QueueError> {
        loop {
            let enough = if self.merges {
                self.space.len() >= MAX_PACKET
            } else {
                !self.chains.is_empty()
            };
            if enough {
                return Ok(true);
            }
            match self.queue.pop()? {
                Some(chain) => {
                    let room = chain.writable.len();
                    if room < HEADER || !self.space.append(chain.writable) {
                        return Err(QueueError::Small(room));
                    }
                    self.chains.push_back((chain.head, room));
                }
                None if self.queue.resume_kicks()? => {}
                None => return Ok(false),
            }
        }
    }

    /// Gives the guest the packet that was read into the room.
    fn deliver(&mut self, length: usize) -> Result<(), QueueError> {
        self.used.clear();
        let (mut left, mut taken) = (length, 0);
        while left > 0 || self.used.is_empty() {
            let Some((head, room)) = self.chains.pop_front() else {
                break;
            };
            let part = left.min(room);
            // At most MAX_PACKET.
            self.used.push((head, u32::try_from(part).unwrap_or(u32::MAX)));
            left -= part;
            taken += room;
        }
        let mut packet = self.space.split_to(taken);
        packet.split_to(NUM_BUFFERS);
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        packet.put(&count.to_le_bytes());
        self.queue.add_used_together(&self.used)
    }
}

fn drain(event: &EventFd) {
    // Readable, so it does not block; its count does not matter.
    let _ = event.read();
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd stays open for as long as the borrow of it lasts.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
