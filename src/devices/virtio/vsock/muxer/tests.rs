//! Tests of the muxer: a mock guest sends and receives packets, and the host's side consists of pipes.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::log_capture::LogCapture;
use crate::devices::virtio::{
    buffers::Buffers,
    mock::{memory, stall_timer},
    vsock::{
        connection::RECEIVE_BUFFER_SIZE,
        packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    },
};
use crate::memory::GuestMemory;

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
/// The addresses of the payload that the guest sends and receives.
const FROM_GUEST: u64 = 0x1_0000;
const TO_GUEST: u64 = 0x8_0000;

/// A guest, and the muxer that it is connected to.
struct Guest {
    muxer: Muxer,
    memory: GuestMemory,
    /// The guest's credit, sent in each header.
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new() -> Self {
        Self {
            muxer: Muxer::new(&stall_timer()).unwrap(),
            memory: memory(),
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
        }
    }

    /// A guest that is connected to a stream with these descriptors.
    fn connected(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let mut guest = Self::new();
        guest.muxer.open(PORT, input, output).unwrap();
        guest.send_operation(Operation::Request, 0, b"");
        assert_eq!(guest.received_packets(), [(Operation::Response, 0, vec![])]);
        guest
    }

    fn header(&self, operation: Operation, flags: u32, length: usize) -> PacketHeader {
        PacketHeader {
            source_cid: GUEST_CID.into(),
            destination_cid: HOST_CID.into(),
            source_port: GUEST_PORT,
            destination_port: PORT,
            length: u32::try_from(length).unwrap(),
            socket_type: TYPE_STREAM,
            operation: Some(operation),
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn send_operation(&mut self, operation: Operation, flags: u32, payload: &[u8]) {
        self.send_packet(self.header(operation, flags, payload.len()), payload);
    }

    fn send_packet(&mut self, header: PacketHeader, payload: &[u8]) {
        self.memory.write_slice(payload, GuestAddress(FROM_GUEST)).unwrap();
        let mut buffers = Buffers::from_range(&self.memory, FROM_GUEST, payload.len()).unwrap();
        self.muxer.receive(&header, &mut buffers);
    }

    /// Receives all packets for the guest: operation, flags and payload of each.
    fn received_packets(&mut self) -> Vec<(Operation, u32, Vec<u8>)> {
        self.muxer.poll().unwrap();
        let mut received = Vec::new();
        while self.muxer.has_packet() {
            let space = Buffers::from_range(&self.memory, TO_GUEST, 4096).unwrap();
            if let Some(header) = self.muxer.next_packet(&space) {
                let mut payload = vec![0; header.length as usize];
                self.memory.read_slice(&mut payload, GuestAddress(TO_GUEST)).unwrap();
                received.push((header.operation.unwrap(), header.flags, payload));
            }
        }
        received
    }
}

/// A pipe: a non-blocking reader, and a writer.
fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let reader = OwnedFd::from(reader);
    fcntl_setfl(&reader, fcntl_getfl(&reader).unwrap() | OFlags::NONBLOCK).unwrap();
    (File::from(reader), writer.into())
}

/// Reads everything that is in the pipe.
fn read_available(reader: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    match reader.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => panic!("{error}"),
    }
    bytes
}

#[test]
fn only_a_privileged_process_can_connect_to_the_port_of_the_agent() {
    for (guest_port, expected) in [
        (LAST_RESERVED_PORT + 1, Operation::Reset),
        (LAST_RESERVED_PORT, Operation::Response),
    ] {
        let mut guest = Guest::new();
        let (_reader, writer) = pipe();
        guest.muxer.open(AGENT_PORT, None, Some(writer)).unwrap();
        let request = PacketHeader {
            source_port: guest_port,
            destination_port: AGENT_PORT,
            ..guest.header(Operation::Request, 0, 0)
        };
        guest.send_packet(request, b"");
        assert_eq!(guest.received_packets(), [(expected, 0, vec![])], "port {guest_port}");
    }
}

#[test]
fn stream_without_data_does_not_block_the_next_stream() {
    let (_output_reader, output) = pipe();
    let (idle_input, _idle_writer) = io::pipe().unwrap();
    let (input, mut writer) = io::pipe().unwrap();
    writer.write_all(b"word").unwrap();
    let mut guest = Guest::new();
    guest.muxer.open(PORT, Some(idle_input.into()), Some(output)).unwrap();
    guest.muxer.open(PORT + 1, Some(input.into()), None).unwrap();

    guest.send_operation(Operation::Request, 0, b"");
    let other = PacketHeader {
        destination_port: PORT + 1,
        ..guest.header(Operation::Request, 0, 0)
    };
    guest.send_packet(other, b"");

    let received = guest.received_packets();
    assert_eq!(
        received[2..],
        [(Operation::Payload, 0, b"word".to_vec())],
        "after both responses"
    );
}

#[test]
fn guest_can_connect_only_to_ports_with_a_stream_and_once_per_port() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let mut second = guest.header(Operation::Request, 0, 0);
    second.source_port += 1;
    guest.send_packet(second, b"");
    assert_eq!(
        guest.received_packets(),
        [(Operation::Reset, 0, vec![])],
        "the port is taken"
    );
    let mut elsewhere = guest.header(Operation::Request, 0, 0);
    elsewhere.destination_port = 22;
    guest.send_packet(elsewhere, b"");
    assert_eq!(
        guest.received_packets(),
        [(Operation::Reset, 0, vec![])],
        "no stream there"
    );
}

#[test]
fn output_reaches_the_pipe_and_shutdown_closes_the_pipe() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    guest.send_operation(Operation::Payload, 0, b"last ");
    guest.send_operation(Operation::Payload, 0, b"words");
    guest.send_operation(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");

    let mut output = Vec::new();
    reader.read_to_end(&mut output).unwrap();

    assert_eq!(output, b"last words", "and end of file: otherwise the read would fail");
    assert_eq!(guest.received_packets(), [(Operation::Reset, 0, vec![])]);
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn pending_bytes_are_delivered_before_the_stream_closes() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 32 << 10];
    // 64 KiB fill the pipe; the remainder is pending.
    for _ in 0..6 {
        guest.send_operation(Operation::Payload, 0, &block);
    }
    guest.send_operation(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");
    assert_eq!(guest.muxer.take_notices(), []);

    let mut output = Vec::new();
    for _ in 0..6 {
        output.extend(read_available(&mut reader));
        guest.muxer.poll().unwrap();
    }

    assert_eq!(output.len(), 6 * block.len());
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
    assert_eq!(guest.received_packets(), [(Operation::Reset, 0, vec![])]);
}

#[test]
fn pending_bytes_survive_a_reset_by_the_guest() {
    // Linux sends the RESET 8 s after a SHUTDOWN to which it got no reply (`VSOCK_CLOSE_TIMEOUT`).
    for shutdown in [None, Some(SHUTDOWN_SEND), Some(SHUTDOWN_SEND | SHUTDOWN_RECEIVE)] {
        let (mut reader, writer) = pipe();
        let mut guest = Guest::connected(None, Some(writer));
        let block = vec![b'a'; 48 << 10];
        guest.send_operation(Operation::Payload, 0, &block);
        guest.send_operation(Operation::Payload, 0, &block);
        if let Some(flags) = shutdown {
            guest.send_operation(Operation::Shutdown, flags, b"");
        }
        guest.send_operation(Operation::Reset, 0, b"");

        let mut output = read_available(&mut reader);
        guest.muxer.poll().unwrap();
        output.extend(read_available(&mut reader));

        assert_eq!(output.len(), 2 * block.len(), "after a shutdown of {shutdown:?}");
        assert_eq!(guest.received_packets(), [], "a RESET gets no reply");
        assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
    }
}

#[test]
fn credit_update_is_sent_on_request_and_after_the_reader_has_taken_data() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 64 << 10];
    for _ in 0..3 {
        guest.send_operation(Operation::Payload, 0, &block);
    }
    guest.received_packets();
    guest.send_operation(Operation::CreditRequest, 0, b"");
    assert_eq!(guest.received_packets(), [(Operation::CreditUpdate, 0, vec![])]);
    assert_eq!(guest.received_packets(), [], "the reader has taken nothing since");
    read_available(&mut reader);
    assert_eq!(guest.received_packets(), [(Operation::CreditUpdate, 0, vec![])]);
}

#[test]
fn stream_is_reset_if_the_guest_exceeds_its_credit() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 64 << 10];
    let within = RECEIVE_BUFFER_SIZE as usize / block.len() + 1;
    for _ in 0..within {
        guest.send_operation(Operation::Payload, 0, &block);
    }
    assert_eq!(guest.muxer.take_notices(), []);
    guest.send_operation(Operation::Payload, 0, &block);
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
    assert!(guest.received_packets().contains(&(Operation::Reset, 0, vec![])));
}

#[test]
fn input_is_sent_within_the_guests_credit_and_end_of_file_is_a_half_close() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::new();
    guest.buf_alloc = 10;
    guest.muxer.open(PORT, Some(reader.into()), None).unwrap();
    writer.write_all(b"0123456789abcdef").unwrap();
    guest.send_operation(Operation::Request, 0, b"");
    assert_eq!(
        guest.received_packets(),
        [
            (Operation::Response, 0, vec![]),
            (Operation::Payload, 0, b"0123456789".to_vec())
        ]
    );
    guest.fwd_cnt = 10;
    guest.send_operation(Operation::CreditUpdate, 0, b"");
    assert_eq!(guest.received_packets(), [(Operation::Payload, 0, b"abcdef".to_vec())]);
    guest.fwd_cnt = 16;
    guest.send_operation(Operation::CreditUpdate, 0, b"");
    drop(writer);
    assert_eq!(guest.received_packets(), [(Operation::Shutdown, SHUTDOWN_SEND, vec![])]);
    assert_eq!(guest.muxer.take_notices(), [], "the guest may still be reading");
    guest.send_operation(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn data_written_after_the_connection_reaches_the_guest() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    assert_eq!(guest.received_packets(), []);
    writer.write_all(b"late").unwrap();
    assert_eq!(guest.received_packets(), [(Operation::Payload, 0, b"late".to_vec())]);
}

#[test]
fn nothing_is_sent_if_the_guests_credit_is_invalid() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    guest.fwd_cnt = 1 << 31;
    guest.buf_alloc = 0;
    guest.send_operation(Operation::CreditUpdate, 0, b"");
    writer.write_all(b"stuck").unwrap();
    assert_eq!(guest.received_packets(), []);
}

#[test]
fn closed_reader_resets_the_stream() {
    let (reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    drop(reader);
    guest.send_operation(Operation::Payload, 0, b"lost");
    assert_eq!(guest.received_packets(), [(Operation::Reset, 0, vec![])]);
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn payload_to_a_stream_without_output_is_refused() {
    let (reader, _writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    guest.send_operation(Operation::Payload, 0, b"x");
    assert!(guest.received_packets().contains(&(Operation::Reset, 0, vec![])));
}

#[test]
fn drain_is_reported_when_the_bytes_are_delivered_or_the_stream_is_closed() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::new();
    guest.muxer.open(PORT, None, Some(writer)).unwrap();
    guest.muxer.drain(PORT, 4);
    assert_eq!(guest.muxer.take_notices(), [], "the guest has not connected yet");
    guest.send_operation(Operation::Request, 0, b"");
    guest.send_operation(Operation::Payload, 0, b"123");
    assert_eq!(guest.muxer.take_notices(), []);
    guest.send_operation(Operation::Payload, 0, b"4");
    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Drained(PORT)]);
    assert_eq!(read_available(&mut reader), b"1234");
    guest.muxer.drain(PORT, 9);
    guest.muxer.close(PORT);
    assert_eq!(
        guest.muxer.take_notices(),
        [StreamNotice::Drained(PORT), StreamNotice::Closed(PORT)]
    );
    guest.muxer.drain(PORT, 9);
    assert_eq!(
        guest.muxer.take_notices(),
        [StreamNotice::Drained(PORT)],
        "the stream is closed already"
    );
}

#[test]
fn drain_of_a_stream_that_cannot_be_watched_is_reported() {
    let mut guest = Guest::new();
    // The kernel refuses to watch the poller with itself.
    let input = guest.muxer.poller().try_clone_to_owned().unwrap();
    guest.muxer.open(PORT, Some(input), None).unwrap();
    guest.muxer.drain(PORT, 5);

    guest.send_operation(Operation::Request, 0, b"");

    let expected = [StreamNotice::Drained(PORT), StreamNotice::Closed(PORT)];
    assert_eq!(guest.muxer.take_notices(), expected);
}

#[test]
fn number_of_pending_resets_is_bounded() {
    let mut guest = Guest::new();
    for _ in 0..10_000 {
        guest.send_operation(Operation::Payload, 0, b"x");
    }
    assert_eq!(guest.received_packets().len(), MAX_PENDING_RESETS);
}

#[test]
fn packet_of_another_type_or_from_another_cid_is_refused() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let mut datagram = guest.header(Operation::Payload, 0, 0);
    datagram.socket_type = 3;
    guest.send_packet(datagram, b"");
    assert_eq!(guest.received_packets(), [(Operation::Reset, 0, vec![])]);
    let mut other_cid = guest.header(Operation::Payload, 0, 0);
    other_cid.source_cid = 99;
    guest.send_packet(other_cid, b"");
    assert_eq!(guest.received_packets(), [], "there is no CID to reply to");
}

#[test]
fn failure_of_a_stream_is_logged_and_counted_once() {
    let full = || OwnedFd::from(File::options().write(true).open("/dev/full").unwrap());
    // Reads of a directory fail.
    let unreadable = || OwnedFd::from(File::open("/").unwrap());
    let (_reader, output) = pipe();
    /// What it is called, its input and output, its cause, and its line in the log.
    type Failure = (
        &'static str,
        Option<OwnedFd>,
        Option<OwnedFd>,
        fn(&mut Guest),
        &'static str,
    );
    let cases: [Failure; 5] = [
        (
            "output to a full file system",
            None,
            Some(full()),
            |guest| guest.send_operation(Operation::Payload, 0, b"text"),
            "stream of port 1024: queue 1: output of a process is lost: the host cannot write it: No space left on \
             device (os error 28)",
        ),
        (
            "unreadable input",
            Some(unreadable()),
            None,
            |guest| drop(guest.received_packets()),
            "stream of port 1024: queue 0: input of a process ends early: the host cannot read it: Is a directory \
             (os error 21)",
        ),
        (
            "data without an output",
            None,
            None,
            |guest| guest.send_operation(Operation::Payload, 0, b"text"),
            "stream of port 1024: queue 1: the stream is closed because the guest sent data after the end of its output, \
             or to a stream without output",
        ),
        (
            "second request",
            None,
            Some(output),
            |guest| guest.send_operation(Operation::Request, 0, b""),
            "stream of port 1024: queue 1: the stream is closed because the guest sent a packet that is invalid on an \
             open stream",
        ),
        (
            "foreign source",
            None,
            None,
            |guest| {
                let header = PacketHeader {
                    source_cid: 9,
                    ..guest.header(Operation::Payload, 0, 0)
                };
                guest.send_packet(header, b"");
            },
            "queue 1: a packet of the guest is dropped: its source is CID 9",
        ),
    ];
    for (what, input, output, cause, expected) in cases {
        let log = LogCapture::on_this_thread("vsock");
        let mut guest = Guest::new();
        guest.muxer.open(PORT, input, output).unwrap();
        guest.send_operation(Operation::Request, 0, b"");

        cause(&mut guest);

        assert_eq!(log.lines(), [expected], "{what}");
        assert_eq!(guest.muxer.counters().read().errors, 1, "{what}");
    }
}

#[test]
fn reader_that_closes_its_end_is_no_failure() {
    let log = LogCapture::on_this_thread("vsock");
    let (reader, output) = pipe();
    let mut guest = Guest::connected(None, Some(output));
    drop(reader);

    guest.send_operation(Operation::Payload, 0, b"text");

    assert_eq!(guest.muxer.take_notices(), [StreamNotice::Closed(PORT)]);
    assert_eq!(log.lines(), Vec::<String>::new());
}

#[test]
fn stream_whose_reader_does_not_read_is_pending_and_starts_the_stall_timer() {
    let timer = stall_timer();
    let (mut reader, output) = pipe();
    let mut guest = Guest::new();
    guest.muxer = Muxer::new(&timer).unwrap();
    guest.muxer.open(PORT, None, Some(output)).unwrap();
    guest.send_operation(Operation::Request, 0, b"");
    // The pipe takes 64 KiB.
    for _ in 0..16 {
        guest.send_operation(Operation::Payload, 0, &[b'x'; 4096]);
    }
    assert_eq!((guest.muxer.pending(), timer.is_running()), (vec![], false));
    guest.send_operation(Operation::Payload, 0, b"more");

    let [pending] = &guest.muxer.pending()[..] else {
        panic!("{:?}", guest.muxer);
    };
    assert_eq!(
        (pending.place.as_str(), pending.progress),
        ("queue 1, stream of port 1024", 65_536)
    );
    assert!(pending.reason.contains("does not read, 4 bytes wait"), "{pending:?}");
    assert!(timer.is_running());

    read_available(&mut reader);
    guest.muxer.poll().unwrap();
    assert_eq!(guest.muxer.pending(), []);
}

#[test]
fn broken_poller_is_logged_and_the_device_goes_on() {
    use crate::devices::virtio::vsock::Vsock;

    let log = LogCapture::on_this_thread("vsock");
    let mut muxer = Muxer::new(&stall_timer()).unwrap();
    muxer.epoll = File::open("/dev/null").unwrap().into();

    Vsock::new(muxer).serve_streams().unwrap();

    let expected = "the streams of processes may stop: cannot wait for their events: Invalid argument (os error 22)";
    assert_eq!(log.lines(), [expected]);
}
