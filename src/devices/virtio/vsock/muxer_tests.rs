//! The muxer as a guest sees it: packets in, packets out, pipes on the host's side.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::{
    buffers::Buffers,
    queue::tests::memory,
    vsock::{
        connection::RECEIVE_BUFFER,
        packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    },
};
use crate::memory::GuestMemory;

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
const FROM_GUEST: u64 = 0x1_0000;
const TO_GUEST: u64 = 0x8_0000;

/// A muxer, and a guest that talks to it.
struct Guest {
    muxer: Muxer,
    memory: GuestMemory,
    /// What the guest says of its own receive buffer.
    buffer: u32,
    forwarded: u32,
}

impl Guest {
    fn new() -> Self {
        Self {
            muxer: Muxer::new().unwrap(),
            memory: memory(),
            buffer: 1 << 18,
            forwarded: 0,
        }
    }

    /// A guest connected to a stream that reads from and writes to these.
    fn connected(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let mut guest = Self::new();
        guest.muxer.open(PORT, input, output).unwrap();
        guest.says(Operation::Request, 0, b"");
        assert_eq!(guest.hears(), [(Operation::Response, 0, vec![])]);
        guest
    }

    fn packet(&self, operation: Operation, flags: u32, length: usize) -> Packet {
        Packet {
            source_cid: GUEST_CID.into(),
            destination_cid: HOST_CID.into(),
            source_port: GUEST_PORT,
            destination_port: PORT,
            length: u32::try_from(length).unwrap(),
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer: self.buffer,
            forwarded: self.forwarded,
        }
    }

    fn says(&mut self, operation: Operation, flags: u32, payload: &[u8]) {
        self.sends(self.packet(operation, flags, payload.len()), payload);
    }

    fn sends(&mut self, packet: Packet, payload: &[u8]) {
        self.memory.write_slice(payload, GuestAddress(FROM_GUEST)).unwrap();
        let mut buffers = Buffers::over(&self.memory, FROM_GUEST, payload.len()).unwrap();
        self.muxer.receive(&packet, &mut buffers);
    }

    /// All packets for the guest: operation, flags, payload.
    fn hears(&mut self) -> Vec<(Operation, u32, Vec<u8>)> {
        self.muxer.poll().unwrap();
        let mut heard = Vec::new();
        while self.muxer.has_packet() {
            let room = Buffers::over(&self.memory, TO_GUEST, 4096).unwrap();
            if let Some(packet) = self.muxer.send(&room) {
                let mut payload = vec![0; packet.length as usize];
                self.memory.read_slice(&mut payload, GuestAddress(TO_GUEST)).unwrap();
                heard.push((packet.operation.unwrap(), packet.flags, payload));
            }
        }
        heard
    }

    fn notices(&mut self) -> Vec<StreamNotice> {
        self.muxer.take_notices()
    }
}

/// A pipe whose ends do not keep a test waiting: reading end, writing end.
fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let reader = OwnedFd::from(reader);
    fcntl_setfl(&reader, fcntl_getfl(&reader).unwrap() | OFlags::NONBLOCK).unwrap();
    (File::from(reader), writer.into())
}

fn read_all(reader: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    match reader.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => panic!("{error}"),
    }
    bytes
}

#[test]
fn stream_with_nothing_to_say_does_not_end_the_next() {
    let (_quiet, silence) = pipe();
    let (input, mut writer) = io::pipe().unwrap();
    writer.write_all(b"word").unwrap();
    let mut guest = Guest::new();
    let (quiet, _waits) = io::pipe().unwrap();
    guest.muxer.open(PORT, Some(quiet.into()), Some(silence)).unwrap();
    guest.muxer.open(PORT + 1, Some(input.into()), None).unwrap();

    guest.says(Operation::Request, 0, b"");
    let other = Packet {
        destination_port: PORT + 1,
        ..guest.packet(Operation::Request, 0, 0)
    };
    guest.sends(other, b"");

    let heard = guest.hears();
    assert_eq!(
        heard[2..],
        [(Operation::Payload, 0, b"word".to_vec())],
        "after both responses"
    );
}

#[test]
fn guest_reaches_only_ports_that_have_a_stream_and_each_once() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let mut second = guest.packet(Operation::Request, 0, 0);
    second.source_port += 1;
    guest.sends(second, b"");
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])], "the port is taken");
    let mut elsewhere = guest.packet(Operation::Request, 0, 0);
    elsewhere.destination_port = 22;
    guest.sends(elsewhere, b"");
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])], "no stream there");
}

#[test]
fn output_reaches_the_pipe_and_its_end_closes_the_pipe() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    guest.says(Operation::Payload, 0, b"last ");
    guest.says(Operation::Payload, 0, b"words");
    guest.says(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");

    let mut output = Vec::new();
    reader.read_to_end(&mut output).unwrap();

    assert_eq!(output, b"last words", "and end of file, or the read had failed");
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])]);
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn bytes_that_the_reader_has_not_taken_are_kept_and_delivered_before_the_end() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 32 << 10];
    // 64 KiB fill the pipe, the rest is pending.
    for _ in 0..6 {
        guest.says(Operation::Payload, 0, &block);
    }
    guest.says(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");
    assert_eq!(guest.notices(), []);

    let mut output = Vec::new();
    for _ in 0..6 {
        output.extend(read_all(&mut reader));
        guest.muxer.poll().unwrap();
    }

    assert_eq!(output.len(), 6 * block.len());
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])]);
}

#[test]
fn pending_bytes_survive_a_reset_by_the_guest() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 48 << 10];
    guest.says(Operation::Payload, 0, &block);
    guest.says(Operation::Payload, 0, &block);
    guest.says(Operation::Reset, 0, b"");

    let mut output = read_all(&mut reader);
    guest.muxer.poll().unwrap();
    output.extend(read_all(&mut reader));

    assert_eq!(output.len(), 2 * block.len());
    assert_eq!(guest.hears(), [], "a guest that said RESET is not answered");
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn guest_hears_of_room_only_as_the_reader_takes_bytes() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 64 << 10];
    for _ in 0..3 {
        guest.says(Operation::Payload, 0, &block);
    }
    guest.hears();
    guest.says(Operation::CreditRequest, 0, b"");
    assert_eq!(guest.hears(), [(Operation::CreditUpdate, 0, vec![])]);
    assert_eq!(guest.hears(), [], "nothing was taken since");
    read_all(&mut reader);
    assert_eq!(guest.hears(), [(Operation::CreditUpdate, 0, vec![])]);
}

#[test]
fn guest_that_sends_more_than_its_credit_is_cut_off_and_holds_no_memory() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let block = vec![b'a'; 64 << 10];
    let within = RECEIVE_BUFFER as usize / block.len() + 1;
    for _ in 0..within {
        guest.says(Operation::Payload, 0, &block);
    }
    assert_eq!(guest.notices(), []);
    guest.says(Operation::Payload, 0, &block);
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
    assert!(guest.hears().contains(&(Operation::Reset, 0, vec![])));
}

#[test]
fn input_is_sent_within_the_guests_credit_and_its_end_is_a_half_close() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::new();
    guest.buffer = 10;
    guest.muxer.open(PORT, Some(reader.into()), None).unwrap();
    writer.write_all(b"0123456789abcdef").unwrap();
    guest.says(Operation::Request, 0, b"");
    assert_eq!(
        guest.hears(),
        [
            (Operation::Response, 0, vec![]),
            (Operation::Payload, 0, b"0123456789".to_vec())
        ]
    );
    guest.forwarded = 10;
    guest.says(Operation::CreditUpdate, 0, b"");
    assert_eq!(guest.hears(), [(Operation::Payload, 0, b"abcdef".to_vec())]);
    guest.forwarded = 16;
    guest.says(Operation::CreditUpdate, 0, b"");
    drop(writer);
    assert_eq!(guest.hears(), [(Operation::Shutdown, SHUTDOWN_SEND, vec![])]);
    assert_eq!(guest.notices(), [], "the guest may still be reading");
    guest.says(Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, b"");
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn input_that_comes_later_wakes_the_stream() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    assert_eq!(guest.hears(), []);
    writer.write_all(b"late").unwrap();
    assert_eq!(guest.hears(), [(Operation::Payload, 0, b"late".to_vec())]);
}

#[test]
fn credit_that_makes_no_sense_sends_nothing_and_does_not_panic() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    guest.forwarded = 1 << 31;
    guest.buffer = 0;
    guest.says(Operation::CreditUpdate, 0, b"");
    writer.write_all(b"stuck").unwrap();
    assert_eq!(guest.hears(), []);
}

#[test]
fn reader_that_goes_away_resets_the_stream() {
    let (reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    drop(reader);
    guest.says(Operation::Payload, 0, b"to nobody");
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])]);
    assert_eq!(guest.notices(), [StreamNotice::Closed(PORT)]);
}

#[test]
fn payload_into_a_stream_without_output_is_refused() {
    let (reader, _writer) = io::pipe().unwrap();
    let mut guest = Guest::connected(Some(reader.into()), None);
    guest.says(Operation::Payload, 0, b"x");
    assert!(guest.hears().contains(&(Operation::Reset, 0, vec![])));
}

#[test]
fn drain_is_answered_when_the_count_was_delivered_or_the_stream_is_closed() {
    let (mut reader, writer) = pipe();
    let mut guest = Guest::new();
    guest.muxer.open(PORT, None, Some(writer)).unwrap();
    guest.muxer.drain(PORT, 4);
    assert_eq!(guest.notices(), [], "the guest has not even connected");
    guest.says(Operation::Request, 0, b"");
    guest.says(Operation::Payload, 0, b"123");
    assert_eq!(guest.notices(), []);
    guest.says(Operation::Payload, 0, b"4");
    assert_eq!(guest.notices(), [StreamNotice::Drained(PORT)]);
    assert_eq!(read_all(&mut reader), b"1234");
    guest.muxer.drain(PORT, 9);
    guest.muxer.close(PORT);
    assert_eq!(
        guest.notices(),
        [StreamNotice::Drained(PORT), StreamNotice::Closed(PORT)]
    );
    guest.muxer.drain(PORT, 9);
    assert_eq!(guest.notices(), [StreamNotice::Drained(PORT)], "a stream that is gone");
}

#[test]
fn flood_of_packets_to_nowhere_keeps_a_bounded_number_of_answers() {
    let mut guest = Guest::new();
    for _ in 0..10_000 {
        guest.says(Operation::Payload, 0, b"x");
    }
    assert_eq!(guest.hears().len(), MAX_RESETS);
}

#[test]
fn packets_of_another_type_or_for_another_host_are_refused() {
    let (_reader, writer) = pipe();
    let mut guest = Guest::connected(None, Some(writer));
    let mut datagram = guest.packet(Operation::Payload, 0, 0);
    datagram.kind = 3;
    guest.sends(datagram, b"");
    assert_eq!(guest.hears(), [(Operation::Reset, 0, vec![])]);
    let mut stranger = guest.packet(Operation::Payload, 0, 0);
    stranger.source_cid = 99;
    guest.sends(stranger, b"");
    assert_eq!(guest.hears(), [], "nobody to answer to");
}
