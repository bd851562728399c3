//! Relays DNS queries for Docker's resolver to the host. The resolver listens in the network namespace of the container
//! on the host, on a loopback address, which packets of the guest cannot reach. A separate process relays the queries,
//! and ends with its stream to the host.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nutshell_protocol::{
    DOCKER_RESOLVER, Failure, FrameBuffer, MAX_NAME_FRAME, MAX_NAME_QUERIES, NameAnswer, NameQuery, encode,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto};

use crate::connection::await_connection;
use crate::failure::Context;
use crate::sys;

/// The largest number of TCP connections. Further ones wait in the backlog.
const MAX_CONNECTIONS: usize = 16;

/// How long a query waits for an answer. The host gives up earlier.
const QUERY_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a TCP connection may be idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How often queries and connections are checked for their timeouts.
const CHECK_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The largest DNS message, and the largest read, in bytes.
const MAX_MESSAGE: usize = 65_535;

/// Receives queries, and forks a process that relays them to the host over `stream`. Call this in a job.
pub(crate) fn start(stream: &OwnedFd) -> Result<(), Failure> {
    let sockets = Sockets::open().context(|| format!("receive DNS queries for {DOCKER_RESOLVER}"))?;
    await_connection(stream).context(|| "wait for the stream to the host to connect".to_owned())?;
    rustix::io::ioctl_fionbio(stream, true)
        .map_err(io::Error::from)
        .context(|| "set a socket to non-blocking".to_owned())?;
    if sys::fork()
        .context(|| "fork the process that relays DNS queries".to_owned())?
        .is_some()
    {
        return Ok(());
    }
    sys::close_all_but(&[
        stream.as_fd(),
        sockets.udp.as_fd(),
        sockets.tcp.as_fd(),
        sockets.raw.as_fd(),
        sockets.bpf_link.as_fd(),
    ]);
    // The exit status is not used. Queries are refused after this process has ended.
    sys::exit_now(Relay::new(stream, &sockets).run().is_err().into())
}

#[derive(Debug)]
struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
    /// Sends the answers to datagrams: `udp` has another port than the one that the queries were sent to.
    raw: OwnedFd,
    /// Closing it stops the BPF program from directing queries to `udp` and `tcp`.
    bpf_link: OwnedFd,
}

impl Sockets {
    fn open() -> io::Result<Self> {
        let address = (*DOCKER_RESOLVER.ip(), 0);
        let (udp, tcp) = (UdpSocket::bind(address)?, TcpListener::bind(address)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let raw = rustix::net::socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::RAW))?;
        let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
        let bpf_link = sys::direct_name_queries(namespace.as_fd(), udp.as_fd(), tcp.as_fd())?;
        Ok(Self {
            udp,
            tcp,
            raw,
            bpf_link,
        })
    }

    /// Sends an answer to a datagram. Like every datagram, it may be lost.
    fn send_datagram(&self, to: SocketAddrV4, message: &[u8]) {
        if let Some(packet) = datagram(to, message) {
            let _ = rustix::net::sendto(&self.raw, &packet, SendFlags::empty(), &to);
        }
    }
}

/// An IPv4 packet (RFC 791) with a datagram (RFC 768) from the resolver. `None` if the message is too large. The kernel
/// fills in the length, the identification and the checksum of the IPv4 header (raw(7)).
fn datagram(to: SocketAddrV4, message: &[u8]) -> Option<Vec<u8>> {
    const IP_HEADER_SIZE: usize = 20;
    const UDP_HEADER_SIZE: usize = 8;
    let length = u16::try_from(UDP_HEADER_SIZE + message.len()).ok()?;
    u16::try_from(IP_HEADER_SIZE + UDP_HEADER_SIZE + message.len()).ok()?;
    let mut packet = Vec::with_capacity(IP_HEADER_SIZE + UDP_HEADER_SIZE + message.len());
    // Version 4, a header of five words; a TTL of 64, UDP.
    packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(DOCKER_RESOLVER.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(DOCKER_RESOLVER.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    // No checksum.
    packet.extend([0, 0]);
    packet.extend(message);
    Some(packet)
}

/// The sender of a query.
#[derive(Debug, Clone, Copy)]
enum Sender {
    Datagram(SocketAddrV4),
    /// Its number among the TCP connections.
    Connection(u32),
}

/// A TCP connection. It has one query at a time.
#[derive(Debug)]
struct Connection {
    socket: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    waits_for_answer: bool,
    last_used: Instant,
}

impl Connection {
    fn is_reading(&self) -> bool {
        !self.waits_for_answer && self.output.is_empty()
    }

    /// Writes what is to be written, then reads until there is a query, and returns it. An error means that the
    /// connection is to be closed.
    fn transfer(&mut self) -> io::Result<Option<Vec<u8>>> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        while self.is_reading() {
            if let Some((length, rest)) = self.input.split_first_chunk() {
                let length = usize::from(u16::from_be_bytes(*length));
                if let Some(message) = rest.get(..length) {
                    let message = message.to_vec();
                    self.input.drain(..2 + length);
                    self.waits_for_answer = true;
                    return Ok(Some(message));
                }
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            self.last_used = Instant::now();
        }
        Ok(None)
    }
}

struct Relay<'a> {
    stream: &'a OwnedFd,
    sockets: &'a Sockets,
    incoming: FrameBuffer,
    outgoing: Vec<u8>,
    last_id: u32,
    /// Queries without an answer, with the time of their arrival.
    queries: BTreeMap<u32, (Instant, Sender)>,
    last_connection: u32,
    connections: BTreeMap<u32, Connection>,
}

impl<'a> Relay<'a> {
    fn new(stream: &'a OwnedFd, sockets: &'a Sockets) -> Self {
        Self {
            stream,
            sockets,
            incoming: FrameBuffer::new(MAX_NAME_FRAME),
            outgoing: Vec::new(),
            last_id: 0,
            queries: BTreeMap::new(),
            last_connection: 0,
            connections: BTreeMap::new(),
        }
    }

    /// Relays until the host closes the stream.
    fn run(mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            self.receive_answers()?;
            self.forget_old();
            self.accept();
            self.transfer_connections()?;
            self.receive_datagrams()?;
            self.flush()?;
        }
    }

    /// Whether another query may be received. Until then, further queries stay in the sockets' buffers.
    fn has_room(&self) -> bool {
        self.queries.len() < MAX_NAME_QUERIES && self.outgoing.is_empty()
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> io::Result<()> {
        let wanted = |condition, flags| if condition { flags } else { PollFlags::empty() };
        let has_room = self.has_room();
        let stream_events = PollFlags::IN | wanted(!self.outgoing.is_empty(), PollFlags::OUT);
        let mut ends = vec![PollFd::new(self.stream, stream_events)];
        if has_room {
            ends.push(PollFd::new(&self.sockets.udp, PollFlags::IN));
        }
        if self.connections.len() < MAX_CONNECTIONS {
            ends.push(PollFd::new(&self.sockets.tcp, PollFlags::IN));
        }
        let first_connection = ends.len();
        for connection in self.connections.values() {
            let events = wanted(!connection.output.is_empty(), PollFlags::OUT)
                | wanted(connection.is_reading() && has_room, PollFlags::IN);
            ends.push(PollFd::new(&connection.socket, events));
        }
        let idle = self.queries.is_empty() && self.connections.is_empty();
        let timeout = (!idle).then_some(&CHECK_INTERVAL);
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends, timeout))?;
        // poll(2) reports a connection that is closed in both directions even if no event is wanted.
        let gone = PollFlags::ERR | PollFlags::HUP;
        let is_gone: Vec<_> = ends[first_connection..]
            .iter()
            .map(|end| end.revents().intersects(gone))
            .collect();
        let mut is_gone = is_gone.into_iter();
        self.connections.retain(|_, _| !is_gone.next().unwrap_or(false));
        Ok(())
    }

    fn receive_answers(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; MAX_MESSAGE];
        loop {
            match rustix::io::read(self.stream, &mut bytes[..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.incoming.push(&bytes[..count]),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            while let Some(answer) = self.incoming.next::<NameAnswer>().map_err(io::Error::other)? {
                self.deliver(&answer);
            }
        }
    }

    fn deliver(&mut self, answer: &NameAnswer) {
        match self.queries.remove(&answer.id) {
            Some((_, Sender::Datagram(to))) => self.sockets.send_datagram(to, &answer.message),
            Some((_, Sender::Connection(number))) => {
                let connection = self.connections.get_mut(&number);
                if let (Some(connection), Ok(length)) = (connection, u16::try_from(answer.message.len())) {
                    connection.output.extend(length.to_be_bytes());
                    connection.output.extend(&answer.message);
                    connection.waits_for_answer = false;
                    connection.last_used = Instant::now();
                }
            }
            // The answer came too late.
            None => {}
        }
    }

    fn forget_old(&mut self) {
        self.queries.retain(|_, (arrival, _)| arrival.elapsed() < QUERY_TIMEOUT);
        self.connections
            .retain(|_, connection| connection.last_used.elapsed() < IDLE_TIMEOUT);
    }

    fn accept(&mut self) {
        while self.connections.len() < MAX_CONNECTIONS {
            // Fails if no connection is pending, or if the pending one has failed.
            let Ok((socket, _)) = self.sockets.tcp.accept() else {
                return;
            };
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            self.last_connection = self.last_connection.wrapping_add(1);
            let connection = Connection {
                socket,
                input: Vec::new(),
                output: Vec::new(),
                waits_for_answer: false,
                last_used: Instant::now(),
            };
            self.connections.insert(self.last_connection, connection);
        }
    }

    fn transfer_connections(&mut self) -> io::Result<()> {
        let numbers: Vec<_> = self.connections.keys().copied().collect();
        for number in numbers {
            let has_room = self.has_room();
            let Some(connection) = self.connections.get_mut(&number) else {
                continue;
            };
            if connection.is_reading() && !has_room {
                continue;
            }
            match connection.transfer() {
                Ok(None) => {}
                Ok(Some(message)) => self.ask(Sender::Connection(number), message)?,
                Err(_) => drop(self.connections.remove(&number)),
            }
        }
        Ok(())
    }

    fn receive_datagrams(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; MAX_MESSAGE];
        while self.has_room() {
            match self.sockets.udp.recv_from(&mut bytes) {
                Ok((count, SocketAddr::V4(from))) => self.ask(Sender::Datagram(from), bytes[..count].to_vec())?,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // A pending error of the socket, which the next call does not report again.
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    fn ask(&mut self, sender: Sender, message: Vec<u8>) -> io::Result<()> {
        self.last_id = self.last_id.wrapping_add(1);
        self.queries.insert(self.last_id, (Instant::now(), sender));
        let query = NameQuery {
            id: self.last_id,
            tcp: matches!(sender, Sender::Connection(_)),
            message,
        };
        let frame = encode(&query, MAX_NAME_FRAME).map_err(io::Error::other)?;
        self.outgoing.extend(frame);
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match rustix::net::send(self.stream, &self.outgoing, SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// Runs `test` in a new network namespace with a loopback interface.
    fn in_namespace(test: impl FnOnce() + Send + 'static) {
        let run = move || {
            sys::unshare_network().unwrap();
            sys::bring_loopback_up(UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
            test();
        };
        thread::spawn(run).join().unwrap();
    }

    /// The host's end of the stream.
    struct Host {
        stream: UnixStream,
        frames: FrameBuffer,
    }

    impl Host {
        fn receive(&mut self) -> NameQuery {
            let mut bytes = [0; 4096];
            loop {
                if let Some(query) = self.frames.next().unwrap() {
                    return query;
                }
                let count = self.stream.read(&mut bytes).unwrap();
                assert_ne!(count, 0, "the relay ended");
                self.frames.push(&bytes[..count]);
            }
        }

        fn answer(&mut self, id: u32, message: &[u8]) {
            let message = message.to_vec();
            let frame = encode(&NameAnswer { id, message }, MAX_NAME_FRAME).unwrap();
            self.stream.write_all(&frame).unwrap();
        }
    }

    /// Runs a relay, and `test` with the host's end of its stream. Asserts that the relay ends with the stream.
    fn with_relay(test: impl FnOnce(Host) + Send + 'static) {
        in_namespace(|| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            let sockets = Sockets::open().unwrap();
            let relay = thread::spawn(move || Relay::new(&theirs.into(), &sockets).run());
            ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            test(Host {
                stream: ours,
                frames: FrameBuffer::new(MAX_NAME_FRAME),
            });
            assert_eq!(relay.join().unwrap().unwrap_err().kind(), ErrorKind::UnexpectedEof);
        });
    }

    fn udp_client() -> UdpSocket {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(DOCKER_RESOLVER).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    fn receive(client: &UdpSocket) -> Vec<u8> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let count = client.recv(&mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    #[test]
    fn each_datagram_gets_its_own_answer() {
        with_relay(|mut host| {
            let (one, two) = (udp_client(), udp_client());
            one.send(b"one").unwrap();
            let first = host.receive();
            two.send(b"two").unwrap();
            let second = host.receive();
            assert_eq!((first.tcp, first.message.as_slice()), (false, b"one".as_slice()));
            assert_eq!((second.tcp, second.message.as_slice()), (false, b"two".as_slice()));

            host.answer(second.id, &[2; 4000]);
            host.answer(second.id, b"twice");
            host.answer(first.id, b"answer");

            assert_eq!(receive(&one), b"answer");
            assert_eq!(receive(&two), [2; 4000]);
        });
    }

    #[test]
    fn connection_gets_one_answer_after_the_other() {
        with_relay(|mut host| {
            let mut client = TcpStream::connect(DOCKER_RESOLVER).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            client.write_all(b"\0\x03one\0\x03two").unwrap();
            for message in [b"one", b"two"] {
                let query = host.receive();
                assert_eq!((query.tcp, query.message.as_slice()), (true, message.as_slice()));
                host.answer(query.id, &[7; 5000]);
                let mut answer = [0; 5002];
                client.read_exact(&mut answer).unwrap();
                assert_eq!(answer[..2], 5000_u16.to_be_bytes());
                assert_eq!(answer[2..], [7; 5000]);
            }
            // A client that leaves before its answer affects no other.
            client.write_all(b"\0\x05three").unwrap();
            let query = host.receive();
            drop(client);
            host.answer(query.id, b"late");
            let other = udp_client();
            other.send(b"other").unwrap();
            let query = host.receive();
            host.answer(query.id, b"answer");
            assert_eq!(receive(&other), b"answer");
        });
    }

    #[test]
    fn servers_in_the_guest_can_have_the_port() {
        with_relay(|mut host| {
            let (server, tcp_server) = (UdpSocket::bind("0.0.0.0:53").unwrap(), TcpListener::bind("0.0.0.0:53"));
            assert!(tcp_server.is_ok());
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.send_to(b"local", "127.0.0.1:53").unwrap();
            server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(receive(&server), b"local");
            client.send_to(b"docker", DOCKER_RESOLVER).unwrap();
            assert_eq!(host.receive().message, b"docker");
        });
    }

    #[test]
    fn message_that_fits_into_no_packet_is_dropped() {
        let to = SocketAddrV4::new(*DOCKER_RESOLVER.ip(), 1000);
        assert_eq!(datagram(to, &[0; 65_507]).unwrap().len(), 65_535);
        assert_eq!(datagram(to, &[0; 65_508]), None);
    }
}
