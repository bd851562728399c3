//! The device as a driver and the host's end of the socket see it.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{Queue, QueueT, mock::MockSplitQueue};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::{
    devices::{
        log_capture::LogCapture,
        virtio::{
            device::serve_or_reset,
            interrupt::Interrupt,
            mock::{InterruptCounter, WRITE, descriptor, memory, stall_timer},
        },
    },
    memory::{GuestMemory, MemoryRegions},
};

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
const RECEIVE_QUEUE: usize = PORT_RECEIVE as usize;
const TRANSMIT: usize = 5;

/// The entries of each queue.
const SIZE: u16 = 16;

/// The entries for which a mock has memory: the second half of its available ring overlaps the used ring.
const MOCK_SIZE: u16 = 4 * SIZE;

/// Where the buffers of a queue are: one of `BUFFER_SIZE` bytes for each entry.
const BUFFERS: u64 = 0x2_0000;
const BUFFER_SIZE: u64 = 0x1000;

/// A driver, the device, and the host's end of the socket.
struct Fixture<'m> {
    memory: &'m GuestMemory,
    queues: Vec<MockSplitQueue<'m, MemoryRegions>>,
    kicks: Vec<EventFd>,
    /// The number of chains that were made available, and that were found used, by queue.
    available: [u16; 6],
    seen: [u16; 6],
    device: NamedPort,
    host: UnixStream,
}

impl<'m> Fixture<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let (host, socket) = UnixStream::pair().unwrap();
        for end in [&host, &socket] {
            end.set_nonblocking(true).unwrap();
        }
        let mut device = NamedPort::new("org.test.0", "named-port", socket.into(), &stall_timer()).unwrap();
        let kicks: Vec<_> = QUEUE_SIZES
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let clone = |kicks: &[EventFd]| kicks.iter().map(|kick| kick.try_clone().unwrap()).collect::<Vec<_>>();
        device.watch_kicks(clone(&kicks)).unwrap();
        let queues = (0..6).map(|queue| MockSplitQueue::create(&**memory, GuestAddress(queue * 0x1000), MOCK_SIZE));
        Self {
            memory,
            queues: queues.collect(),
            kicks,
            available: [0; 6],
            seen: [0; 6],
            device,
            host,
        }
    }

    fn activate(&mut self, features: u64, count: usize) {
        let interrupt: Arc<dyn Interrupt> = Arc::new(InterruptCounter::default());
        let queues = (0..).zip(&self.queues).zip(&self.kicks).take(count);
        let queues = queues.map(|((index, mock), kick)| {
            let mut queue: Queue = mock.create_queue().unwrap();
            queue.set_size(SIZE);
            DeviceQueue::new(
                index,
                queue,
                kick.try_clone().unwrap(),
                self.memory.clone(),
                interrupt.clone(),
            )
        });
        let activation = Activation {
            features,
            queues: queues.collect(),
            interrupt: interrupt.clone(),
            memory: self.memory.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// A device whose driver has found the port.
    fn running(memory: &'m GuestMemory) -> Self {
        let mut fixture = Self::new(memory);
        fixture.activate(COMMON_FEATURES | MULTIPORT, 6);
        for _ in 0..4 {
            fixture.offer(CONTROL_RECEIVE, BUFFER_SIZE);
        }
        for message in [[0, 0, 1], [1, 3, 1]] {
            fixture.send_control(message);
        }
        fixture.settle();
        fixture.received(CONTROL_RECEIVE);
        fixture
    }

    /// A device whose port a program in the guest has open.
    fn open(memory: &'m GuestMemory) -> Self {
        let mut fixture = Self::running(memory);
        fixture.send_control([1, 6, 1]);
        fixture.settle();
        assert!(fixture.device.is_open_in_guest());
        fixture
    }

    fn buffer(queue: usize, entry: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(SIZE) + u64::from(entry)) * BUFFER_SIZE
    }

    /// Makes a chain of one buffer available: bytes to send, or space for as many.
    fn provide(&mut self, queue: usize, length: u64, flags: u16) {
        let entry = self.available[queue] % SIZE;
        let buffer = descriptor(Self::buffer(queue, entry), u32::try_from(length).unwrap(), flags, 0);
        let mock = &self.queues[queue];
        mock.desc_table().store(entry, buffer).unwrap();
        mock.avail().ring().ref_at(entry.into()).unwrap().store(entry);
        self.available[queue] += 1;
        mock.avail().idx().store(self.available[queue]);
        self.kicks[queue].write(1).unwrap();
    }

    /// Makes space for `length` bytes available.
    fn offer(&mut self, queue: usize, length: u64) {
        self.provide(queue, length, WRITE);
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let address = GuestAddress(Self::buffer(queue, self.available[queue] % SIZE));
        self.memory.write_slice(bytes, address).unwrap();
        self.provide(queue, bytes.len() as u64, 0);
    }

    /// Sends a control message: port, event and value.
    fn send_control(&mut self, [port, event, value]: [u8; 3]) {
        self.send(CONTROL_TRANSMIT, &[port, 0, 0, 0, event, 0, value, 0]);
    }

    /// The content of the chains of a queue that were used since the last call.
    fn received(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let used = self.queues[queue].used().idx().load();
        let new = self.seen[queue]..used;
        self.seen[queue] = used;
        new.map(|index| {
            let element = self.queues[queue]
                .used()
                .ring()
                .ref_at((index % SIZE).into())
                .unwrap()
                .load();
            let mut bytes = vec![0; element.len() as usize];
            let address = Self::buffer(queue, u16::try_from(element.id()).unwrap());
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        })
        .collect()
    }

    fn is_ready(&self) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(self.device.poller(), PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    /// Serves the device until it has nothing to do.
    fn settle(&mut self) {
        let mut turns = 0;
        while self.is_ready() {
            self.device.serve().unwrap();
            turns += 1;
            assert!(turns < 1000, "the device is always ready");
        }
    }

    /// What the host can read now. Empty at the end of the stream, too.
    fn read_host(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Err(error) = self.host.read_to_end(&mut bytes) {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
        bytes
    }
}

#[test]
fn driver_finds_one_port_with_its_name_and_an_open_host() {
    let memory = memory();
    let mut fixture = Fixture::new(&memory);
    fixture.activate(COMMON_FEATURES | MULTIPORT, 6);
    let mut config = [0; 12];
    fixture.device.read_config(0, &mut config);
    assert_eq!(config[4..8], 2_u32.to_le_bytes());

    // The driver has no buffers for the messages at first.
    fixture.send_control([0, 0, 1]);
    fixture.settle();
    for _ in 0..3 {
        fixture.offer(CONTROL_RECEIVE, BUFFER_SIZE);
    }
    fixture.settle();
    assert_eq!(fixture.received(CONTROL_RECEIVE), [b"\x01\0\0\0\x01\0\x01\0"]);

    fixture.send_control([1, 3, 1]);
    fixture.settle();
    let messages = fixture.received(CONTROL_RECEIVE);
    assert_eq!(
        messages,
        [&b"\x01\0\0\0\x07\0\x01\0org.test.0"[..], b"\x01\0\0\0\x06\0\x01\0"]
    );
    assert!(!fixture.device.is_open_in_guest());
}

#[test]
fn bytes_pass_both_ways() {
    let memory = memory();
    let mut fixture = Fixture::open(&memory);

    fixture.send(TRANSMIT, b"from ");
    fixture.send(TRANSMIT, b"the guest");
    fixture.settle();
    assert_eq!(fixture.read_host(), b"from the guest");

    fixture.host.write_all(b"to the guest").unwrap();
    fixture.settle();
    fixture.offer(RECEIVE_QUEUE, 4);
    fixture.offer(RECEIVE_QUEUE, 100);
    fixture.settle();
    assert_eq!(fixture.received(RECEIVE_QUEUE), [&b"to t"[..], b"he guest"]);

    let counters = fixture.device.counters().read();
    assert_eq!(
        (
            counters.requests,
            counters.bytes_from_guest,
            counters.bytes_to_guest,
            counters.errors
        ),
        (4, 14, 12, 0)
    );
}

#[test]
fn guest_that_floods_waits_and_no_byte_is_lost() {
    let memory = memory();
    let mut fixture = Fixture::open(&memory);
    let mut sent = Vec::new();
    // More than the socket takes.
    while fixture.available[TRANSMIT] - fixture.queues[TRANSMIT].used().idx().load() < SIZE {
        let bytes = vec![b'a' + u8::try_from(sent.len() % 23).unwrap(); 4096];
        fixture.send(TRANSMIT, &bytes);
        sent.extend(bytes);
        fixture.settle();
        assert!(sent.len() < 64 << 20, "the socket takes everything");
    }

    let mut received = fixture.read_host();
    while received.len() < sent.len() {
        fixture.settle();
        let more = fixture.read_host();
        assert!(!more.is_empty(), "{} of {} bytes", received.len(), sent.len());
        received.extend(more);
    }
    assert!(received == sent);
    assert_eq!(fixture.device.counters().read().errors, 0);
}

#[test]
fn guest_that_does_not_read_leaves_bytes_in_the_socket_and_is_pending() {
    let memory = memory();
    let mut fixture = Fixture::open(&memory);
    let mut sent = 0;
    loop {
        match fixture.host.write(&[b'x'; 4096]) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        fixture.settle();
    }
    assert_eq!(fixture.device.counters().pending().len(), 1);

    let mut received = 0;
    while received < sent {
        fixture.offer(RECEIVE_QUEUE, BUFFER_SIZE);
        fixture.settle();
        let new: usize = fixture.received(RECEIVE_QUEUE).iter().map(Vec::len).sum();
        assert!(new > 0, "{received} of {sent} bytes");
        received += new;
    }
    assert_eq!(received, sent);
    assert_eq!(fixture.device.counters().pending(), []);
}

#[test]
fn bytes_for_a_port_that_is_not_open_never_reach_the_next_program() {
    let memory = memory();
    let mut fixture = Fixture::running(&memory);
    fixture.offer(RECEIVE_QUEUE, BUFFER_SIZE);
    fixture.host.write_all(b"before").unwrap();
    fixture.settle();
    fixture.send_control([1, 6, 1]);
    fixture.settle();
    assert!(fixture.device.is_open_in_guest());
    assert_eq!(fixture.received(RECEIVE_QUEUE), Vec::<Vec<u8>>::new());

    // Closed and opened again before the device is served.
    fixture.host.write_all(b"earlier").unwrap();
    fixture.send_control([1, 6, 0]);
    fixture.send_control([1, 6, 1]);
    fixture.settle();
    fixture.host.write_all(b"now").unwrap();
    fixture.settle();
    assert_eq!(fixture.received(RECEIVE_QUEUE), [b"now"]);

    fixture.device.reset();
    assert!(!fixture.device.is_open_in_guest());
}

/// More bytes than the device drops in one turn.
#[test]
fn all_bytes_for_a_program_that_has_closed_the_port_are_dropped() {
    let memory = memory();
    let mut fixture = Fixture::open(&memory);
    for _ in 0..SIZE {
        fixture.offer(RECEIVE_QUEUE, BUFFER_SIZE);
    }
    let mut earlier = 0;
    while let Ok(count) = fixture.host.write(&[b'-'; 4096]) {
        earlier += count;
    }
    assert!(earlier > MAX_DROPPED_PER_TURN, "{earlier}");

    fixture.send_control([1, 6, 0]);
    fixture.send_control([1, 6, 1]);
    fixture.settle();
    fixture.host.write_all(b"now").unwrap();
    fixture.settle();

    assert_eq!(fixture.received(RECEIVE_QUEUE), [b"now"]);
    assert_eq!(fixture.device.counters().pending(), []);
}

#[test]
fn end_of_the_host_closes_the_port_and_drops_the_guests_bytes() {
    let memory = memory();
    let mut fixture = Fixture::open(&memory);
    fixture.send(TRANSMIT, b"unread");
    fixture.settle();
    fixture.host = UnixStream::pair().unwrap().0;
    fixture.settle();
    let closed = b"\x01\0\0\0\x06\0\0\0";
    assert_eq!(fixture.received(CONTROL_RECEIVE), [closed]);

    fixture.send(TRANSMIT, b"more");
    fixture.settle();
    assert_eq!(fixture.queues[TRANSMIT].used().idx().load(), 2);
}

#[test]
fn driver_without_multiport_has_a_console_that_takes_everything() {
    let memory = memory();
    let mut fixture = Fixture::new(&memory);
    fixture.activate(COMMON_FEATURES, 2);
    for _ in 0..40 {
        fixture.send(CONSOLE_TRANSMIT, b"login: ");
        fixture.settle();
    }
    assert_eq!(fixture.received(CONSOLE_TRANSMIT).len(), 40);
    assert!(!fixture.device.is_open_in_guest());
    assert_eq!(fixture.read_host(), b"");
}

#[test]
fn flood_of_control_messages_ends_each_turn() {
    let memory = memory();
    let mut fixture = Fixture::running(&memory);
    for round in 0..1000_u16 {
        fixture.send_control([1, 6, u8::from(round % 2 == 0)]);
        fixture.send_control([0, 0, 1]);
        fixture.send_control([1, 3, 1]);
        fixture.settle();
    }
    // The driver has one buffer left, and one message of each kind waits.
    assert_eq!(fixture.received(CONTROL_RECEIVE).len(), 1);
    assert!(!fixture.device.is_open_in_guest());
}

#[test]
fn broken_queues_stop_the_device_with_one_line() {
    for (queue, expected) in [
        (CONSOLE_TRANSMIT, "queue 1: the virtqueue is broken"),
        (CONTROL_TRANSMIT, "queue 3: the virtqueue is broken"),
        (TRANSMIT, "queue 5: the virtqueue is broken"),
    ] {
        let memory = memory();
        let mut fixture = Fixture::open(&memory);
        let log = LogCapture::on_this_thread("named-port");
        fixture.queues[queue]
            .avail()
            .idx()
            .store(fixture.available[queue].wrapping_add(SIZE + 1));

        serve_or_reset(&mut fixture.device, NamedPort::serve);

        let lines = log.lines();
        let [line] = &lines[..] else {
            panic!("{queue}: {lines:?}")
        };
        assert!(line.contains(expected), "{line}");
        assert!(!fixture.device.is_open_in_guest());
    }
}

#[test]
fn control_buffer_that_is_too_small_stops_the_device() {
    let memory = memory();
    let mut fixture = Fixture::new(&memory);
    fixture.activate(COMMON_FEATURES | MULTIPORT, 6);
    fixture.offer(CONTROL_RECEIVE, 7);
    fixture.send_control([0, 0, 1]);

    let error = fixture.device.serve().unwrap_err().to_string();

    assert_eq!(
        error,
        "queue 2: the driver provided a buffer of 7 bytes, which is too small"
    );
}
