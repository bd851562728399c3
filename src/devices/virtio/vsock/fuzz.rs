//! The entry point of the fuzz target for streams: a guest with any packets, and a host that opens, reads, writes and
//! closes streams at any time.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{
    collections::{BTreeMap, VecDeque},
    io::{Read, Write, pipe},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use arbitrary::{Result, Unstructured};
use nutshell_protocol::{AGENT_PORT, GUEST_CID, HOST_CID};
use rustix::fs::{OFlags, fcntl_setfl};

use super::{
    connection::RECEIVE_BUFFER_SIZE,
    muxer::StreamNotice,
    packet::{Operation, TYPE_STREAM},
    *,
};
use crate::devices::{
    stall_timer::StallTimer,
    virtio::{
        buffers::Buffers,
        device::{SharedDevice, serve_or_reset},
        fuzz::{
            driver::{Driver, Subject},
            guest::{Guest, HIGH, LOW, Request},
        },
    },
};

const MAX_STEPS: usize = 300;

/// The host ports of streams.
const PORTS: [u32; 4] = [AGENT_PORT, 1024, 1025, 7];

/// The guest's ports, of which the last one is not privileged.
const GUEST_PORTS: [u32; 3] = [500, 501, 4000];

/// The host's end of a stream.
#[derive(Default)]
struct HostStream {
    to_guest: Option<Box<dyn Write>>,
    from_guest: Option<Box<dyn Read>>,
}

/// Interprets `data`, whose first byte selects whether packets pass through virtqueues or directly to the muxer.
///
/// # Panics
///
/// If bytes are lost, invented or reordered, credit is exceeded, or a notice is missing or repeated.
pub fn exchange_packets(data: &[u8]) {
    let Some((selection, data)) = data.split_first() else {
        return;
    };
    let input = &mut Unstructured::new(data);
    if selection & 1 == 0 {
        let muxer = Muxer::new(&Arc::new(StallTimer::new().unwrap())).unwrap();
        let device = SharedDevice::new(Vsock::new(muxer));
        let kicks = Driver::kicks(&device);
        let mut subject = QueueSubject {
            device: device.clone(),
            streams: BTreeMap::new(),
        };
        Driver::new(Box::new(device), kicks).run(input, &mut subject);
    } else {
        let mut model = Model::new();
        for _ in 0..MAX_STEPS {
            // The input may end anywhere.
            if input.is_empty() || model.step(input).is_err() {
                break;
            }
        }
        model.finish();
    }
}

/// Opens a stream, of sockets or pipes.
fn open_stream(input: &mut Unstructured<'_>, muxer: &mut Muxer, port: u32) -> Result<Option<HostStream>> {
    let mut stream = HostStream::default();
    let (mut source, mut target) = (None, None);
    match input.int_in_range(0..=3_u8)? {
        0 => {
            let (host, device) = UnixStream::pair().unwrap();
            host.set_nonblocking(true).unwrap();
            source = Some(OwnedFd::from(device.try_clone().unwrap()));
            target = Some(device.into());
            stream.to_guest = Some(Box::new(host.try_clone().unwrap()));
            stream.from_guest = Some(Box::new(host));
        }
        kind => {
            if kind & 1 != 0 {
                let (reader, writer) = pipe().unwrap();
                fcntl_setfl(&reader, OFlags::NONBLOCK).unwrap();
                stream.from_guest = Some(Box::new(reader));
                target = Some(writer.into());
            }
            if kind & 2 != 0 {
                let (reader, writer) = pipe().unwrap();
                fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
                stream.to_guest = Some(Box::new(writer));
                source = Some(reader.into());
            }
        }
    }
    Ok(muxer.open(port, source, target).ok().map(|()| stream))
}

/// A header, mostly of a packet that fits to a stream.
fn header(input: &mut Unstructured<'_>) -> Result<PacketHeader> {
    let rare = |input: &mut Unstructured<'_>| input.ratio(1_u8, 32);
    let mut bytes = [0; HEADER_SIZE];
    bytes[30] = *input.choose(&[1, 1, 1, 5, 5, 5, 5, 6, 4, 3, 7, 2, 0, 9])?;
    let mut header = PacketHeader::parse(&bytes);
    header.source_cid = if rare(input)? {
        input.arbitrary()?
    } else {
        GUEST_CID.into()
    };
    header.destination_cid = if rare(input)? {
        input.arbitrary()?
    } else {
        HOST_CID.into()
    };
    header.source_port = *input.choose(&GUEST_PORTS)?;
    header.destination_port = if rare(input)? {
        input.arbitrary()?
    } else {
        *input.choose(&PORTS)?
    };
    header.socket_type = if rare(input)? { input.arbitrary()? } else { TYPE_STREAM };
    header.flags = u32::from(input.arbitrary::<u8>()? & 7);
    header.buf_alloc = *input.choose(&[1 << 18, 1 << 18, 1 << 12, 1, 0, u32::MAX])?;
    Ok(header)
}

/// The device with its queues. Only the absence of panics and endless loops is checked.
struct QueueSubject {
    device: SharedDevice<Vsock>,
    streams: BTreeMap<u32, HostStream>,
}

impl Subject for QueueSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, queue: usize) -> Result<Request> {
        if queue == 0 {
            let size = *input.choose(&[4096, 4096, 65_536, 45, 44, 100])?;
            return Ok(Request {
                readable: Vec::new(),
                writable: vec![size],
            });
        }
        let mut header = header(input)?;
        let length = u32::from(input.arbitrary::<u16>()? & 0xfff);
        header.length = if input.ratio(15_u8, 16)? {
            length
        } else {
            input.arbitrary()?
        };
        header.fwd_cnt = if input.ratio(7_u8, 8)? { 0 } else { input.arbitrary()? };
        let mut readable = header.to_bytes().to_vec();
        readable.extend(vec![b'g'; length as usize]);
        Ok(Request {
            readable,
            writable: Vec::new(),
        })
    }

    fn serve(&mut self, queue: usize) {
        let device = &mut *self.device.lock();
        match queue {
            0 => serve_or_reset(device, Vsock::deliver),
            _ => serve_or_reset(device, Vsock::serve_transmit),
        }
    }

    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let device = &mut *self.device.lock();
        let port = *input.choose(&PORTS)?;
        match input.int_in_range(0..=9_u8)? {
            0..=3 => {
                if let Some(stream) = open_stream(input, device.muxer(), port)? {
                    self.streams.insert(port, stream);
                }
            }
            4 => device.muxer().close(port),
            5 => device.muxer().drain(port, input.arbitrary::<u16>()?.into()),
            6 => {
                self.streams.remove(&port);
            }
            7 => {
                // A full pipe, or one without a reader, takes nothing.
                if let Some(writer) = self.streams.get_mut(&port).and_then(|stream| stream.to_guest.as_mut()) {
                    let _ = writer.write(&[b'h'; 5000]);
                }
            }
            _ => {
                if let Some(reader) = self
                    .streams
                    .get_mut(&port)
                    .and_then(|stream| stream.from_guest.as_mut())
                {
                    let _ = reader.read(&mut [0; 5000]);
                }
            }
        }
        serve_or_reset(device, Vsock::serve_streams);
        let muxer = device.muxer();
        let _ = (muxer.take_notices(), muxer.pending());
        Ok(())
    }
}

/// What is known about an open stream.
struct Stream {
    host: HostStream,
    /// The guest's port, once it has connected.
    guest_port: Option<u32>,
    /// What the guest has sent and the host has not read yet.
    from_guest: VecDeque<u8>,
    /// What the host has written and the guest has not received yet.
    to_guest: VecDeque<u8>,
    /// The number of payload bytes in each direction.
    sent_by_guest: u32,
    sent_to_guest: u32,
    /// The number of the guest's bytes that the device reported as taken.
    reported: u32,
    /// The credit fields of the guest's last packet.
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// The muxer, compared with a model.
struct Model {
    guest: Guest,
    muxer: Muxer,
    streams: BTreeMap<u32, Stream>,
    /// Host ports that are open for the muxer, and whether a drain was requested.
    open: BTreeMap<u32, bool>,
    /// The next byte of any payload.
    next_byte: u8,
}

impl Model {
    fn new() -> Self {
        Self {
            guest: Guest::new(),
            muxer: Muxer::new(&Arc::new(StallTimer::new().unwrap())).unwrap(),
            streams: BTreeMap::new(),
            open: BTreeMap::new(),
            next_byte: 0,
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let port = *input.choose(&PORTS)?;
        match input.int_in_range(0..=15_u8)? {
            0 | 1 => {
                let opened = open_stream(input, &mut self.muxer, port)?;
                assert_eq!(opened.is_some(), !self.open.contains_key(&port));
                if let Some(host) = opened {
                    self.open.insert(port, false);
                    let stream = Stream {
                        host,
                        guest_port: None,
                        from_guest: VecDeque::new(),
                        to_guest: VecDeque::new(),
                        sent_by_guest: 0,
                        sent_to_guest: 0,
                        reported: 0,
                        buf_alloc: 0,
                        fwd_cnt: 0,
                    };
                    self.streams.insert(port, stream);
                }
            }
            2 => self.muxer.close(port),
            3 => {
                if let Some(requested) = self.open.get_mut(&port)
                    && !*requested
                {
                    *requested = true;
                    self.muxer.drain(port, input.arbitrary::<u16>()?.into());
                }
            }
            4 => {
                if let Some(stream) = self.streams.get_mut(&port) {
                    match input.arbitrary()? {
                        true => stream.host.to_guest = None,
                        false => stream.host.from_guest = None,
                    }
                }
            }
            5 | 6 => self.write_on_host(port, input)?,
            7 | 8 => self.read_on_host(port, usize::from(input.arbitrary::<u16>()?)),
            9..=12 => self.send(input)?,
            13 => self.muxer.poll().unwrap(),
            _ => self.receive(usize::from(input.arbitrary::<u16>()?) + 1),
        }
        self.take_notices();
        Ok(())
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let bytes = (0..count).map(|_| {
            self.next_byte = self.next_byte.wrapping_add(1);
            self.next_byte
        });
        bytes.collect()
    }

    fn write_on_host(&mut self, port: u32, input: &mut Unstructured<'_>) -> Result<()> {
        let bytes = self.bytes(input.arbitrary::<u16>()?.into());
        if let Some(stream) = self.streams.get_mut(&port)
            && let Some(writer) = &mut stream.host.to_guest
            && let Ok(count) = writer.write(&bytes)
        {
            stream.to_guest.extend(&bytes[..count]);
        }
        Ok(())
    }

    fn read_on_host(&mut self, port: u32, count: usize) {
        let mut bytes = vec![0; count];
        if let Some(stream) = self.streams.get_mut(&port)
            && let Some(reader) = &mut stream.host.from_guest
            && let Ok(count) = reader.read(&mut bytes)
        {
            let expected: Vec<u8> = stream.from_guest.drain(..count).collect();
            assert!(
                bytes[..count] == expected,
                "the host read other bytes than the guest sent"
            );
        }
    }

    /// Sends a packet from the guest.
    fn send(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut header = header(input)?;
        let stream = self.streams.get(&header.destination_port);
        let received = stream.map_or(0, |stream| stream.sent_to_guest);
        header.fwd_cnt = match input.int_in_range(0..=7_u8)? {
            0 => input.arbitrary()?,
            1 => 0,
            _ => received,
        };
        let mut bytes = Vec::new();
        if header.operation == Some(Operation::Payload) {
            bytes = self.bytes(match input.int_in_range(0..=3_u8)? {
                0 => usize::from(input.arbitrary::<u16>()?),
                _ => usize::from(input.arbitrary::<u8>()?),
            });
        }
        header.length = u32::try_from(bytes.len()).unwrap();
        self.guest.write(LOW.start, &bytes);
        let mut payload = Buffers::from_range(&self.guest.memory, LOW.start, bytes.len()).unwrap();
        let is_valid = header.source_cid == u64::from(GUEST_CID)
            && header.destination_cid == u64::from(HOST_CID)
            && header.socket_type == TYPE_STREAM;
        if is_valid && let Some(stream) = self.streams.get_mut(&header.destination_port) {
            let may_connect = header.destination_port != AGENT_PORT || header.source_port <= 1023;
            if stream.guest_port.is_none() && header.operation == Some(Operation::Request) && may_connect {
                stream.guest_port = Some(header.source_port);
            }
            if stream.guest_port == Some(header.source_port) {
                (stream.buf_alloc, stream.fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
                // A packet that ends the stream loses its payload: the notice then removes it from the model.
                stream.from_guest.extend(&bytes);
                stream.sent_by_guest = stream.sent_by_guest.wrapping_add(header.length);
            }
        }
        self.muxer.receive(&header, &mut payload);
        Ok(())
    }

    /// Receives the packets for the guest, in buffers of `space` bytes.
    fn receive(&mut self, space: usize) {
        // Packets with payload end when the host's bytes do, however small the buffers are.
        let mut without_payload = 0;
        while self.muxer.has_packet() {
            assert!(without_payload < 2000, "the device does not stop to send packets");
            without_payload += 1;
            let size = space.min(0x1_0000);
            let buffers = Buffers::from_range(&self.guest.memory, HIGH.start, size).unwrap();
            let Some(header) = self.muxer.next_packet(&buffers) else {
                continue;
            };
            assert_eq!(header.source_cid, u64::from(HOST_CID));
            assert_eq!(header.destination_cid, u64::from(GUEST_CID));
            assert!(header.length as usize <= size);
            if header.length > 0 {
                without_payload -= 1;
            }
            let stream = self.streams.get_mut(&header.source_port);
            let Some(stream) = stream.filter(|stream| stream.guest_port == Some(header.destination_port)) else {
                assert_eq!(
                    header.operation,
                    Some(Operation::Reset),
                    "a packet without a connection"
                );
                continue;
            };
            if header.operation == Some(Operation::Reset) {
                continue;
            }
            stream.receive(&self.guest, &header);
        }
    }

    fn take_notices(&mut self) {
        for notice in self.muxer.take_notices() {
            match notice {
                StreamNotice::Drained(port) => {
                    let requested = self.open.get_mut(&port).expect("drained, but not open");
                    assert!(std::mem::take(requested), "drained twice, or without a request");
                }
                StreamNotice::Closed(port) => {
                    let is_drain_due = self.open.remove(&port).expect("closed twice");
                    assert!(!is_drain_due, "the notice of a drain is missing");
                    self.streams.remove(&port);
                }
            }
        }
    }

    fn finish(&mut self) {
        for pending in self.muxer.pending() {
            assert_ne!(pending.progress, u64::MAX);
        }
        for port in PORTS {
            self.muxer.close(port);
        }
        self.take_notices();
        assert!(self.open.is_empty(), "{:?}", self.open);
        self.receive(4096);
    }
}

impl Stream {
    /// Checks a packet for the guest.
    fn receive(&mut self, guest: &Guest, header: &PacketHeader) {
        assert_eq!(header.buf_alloc, RECEIVE_BUFFER_SIZE);
        let taken = header.fwd_cnt.wrapping_sub(self.reported);
        let in_flight = self.sent_by_guest.wrapping_sub(self.reported);
        assert!(taken <= in_flight, "the device took more bytes than the guest sent");
        assert!(in_flight - taken <= RECEIVE_BUFFER_SIZE);
        self.reported = header.fwd_cnt;
        if header.operation == Some(Operation::Payload) {
            assert_ne!(header.length, 0);
            let credit = self
                .buf_alloc
                .saturating_sub(self.sent_to_guest.wrapping_sub(self.fwd_cnt));
            assert!(
                header.length <= credit,
                "{} bytes with a credit of {credit}",
                header.length
            );
            self.sent_to_guest = self.sent_to_guest.wrapping_add(header.length);
            let count = header.length as usize;
            let expected: Vec<u8> = self.to_guest.drain(..count).collect();
            let received = guest.read(HIGH.start, count).unwrap();
            assert!(
                received == expected,
                "the guest received other bytes than the host wrote"
            );
        } else {
            assert_eq!(header.length, 0);
        }
    }
}
