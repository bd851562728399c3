//! Names of Docker's networks. Docker's resolver listens on a loopback address in the network namespace of the
//! container on the host, where packets of the guest do not arrive. The agent receives the queries of the guest's
//! processes for this address. Each is sent again here from a socket in that namespace, where Docker's NAT rules apply
//! to it.
//!
//! The guest cannot choose the address. It can only choose the queries, as a container in that namespace could.

use std::{
    fs, io,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nutshell_protocol::{
    DOCKER_RESOLVER, FrameBuffer, MAX_NAME_FRAME, MAX_NAME_QUERIES, NameAnswer, NameQuery, Request, encode,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, Notify, Semaphore},
    task::JoinHandle,
};

use crate::shim::{
    machine::Machine,
    network::{error::NetworkError, namespace::run_in_namespace},
};

/// How long the agent may take to start the relay.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the resolver may take for an answer, and for each step with TCP. It asks upstream servers, and waits four
/// seconds for each.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long after the end of a relay the next one may start: a guest that ends each at once gets few of them.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// The largest DNS message, in bytes (RFC 1035, section 4.2.2).
const MAX_MESSAGE: usize = 65_535;

/// The size of the read buffer, in bytes. Most queries are far smaller.
const READ_SIZE: usize = 4 << 10;

/// Whether Docker's resolver runs in the calling thread's network namespace: it has a UDP socket on its address, on any
/// port. Docker's NAT rules direct port 53 to it.
pub(in crate::shim::network) fn has_resolver() -> io::Result<bool> {
    Ok(lists_resolver(&fs::read_to_string("/proc/thread-self/net/udp")?))
}

/// Whether a list of UDP sockets (`/proc/net/udp`) has one on the address of Docker's resolver. The second field of a
/// line is the local address, a number in host byte order, and the port.
fn lists_resolver(sockets: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(DOCKER_RESOLVER.ip().octets()));
    let local_addresses = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
    local_addresses.into_iter().any(|local| local.starts_with(&address))
}

/// A running relay. After a drop, it accepts no more queries.
#[derive(Debug)]
pub(in crate::shim::network) struct NameRelay {
    task: JoinHandle<()>,
}

impl NameRelay {
    /// Starts to relay queries of the guest to the resolver in `namespace`. A machine has at most one relay at a time.
    /// When the relay has ended and another one may start, this notifies `ended`.
    pub(in crate::shim::network) async fn start(
        machine: &Machine,
        namespace: OwnedFd,
        ended: Arc<Notify>,
    ) -> Result<Self, NetworkError> {
        let (ours, theirs) = UnixStream::pair().map_err(NetworkError::Names)?;
        let theirs = theirs.into_std().map_err(NetworkError::Names)?;
        let opened = machine.open_stream(Some(theirs.as_fd()), Some(theirs.as_fd())).await;
        let stream = opened.map_err(io::Error::other).map_err(NetworkError::Names)?;
        let stream_port = stream.port();
        let request = machine.agent().run(Request::RelayNames { stream_port });
        let failure = match tokio::time::timeout(START_TIMEOUT, request).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(NetworkError::from(error)),
            Err(_) => Some(NetworkError::NoAnswer(START_TIMEOUT)),
        };
        if let Some(failure) = failure {
            machine.close_stream(&stream).await;
            return Err(failure);
        }
        let task = tokio::spawn(async move {
            let (queries, answers) = ours.into_split();
            if let Err(error) = relay(queries, answers, Arc::new(namespace)).await {
                log::warn!("names of Docker's networks do not resolve until their relay is started again: {error}");
            }
            tokio::time::sleep(RESTART_DELAY).await;
            ended.notify_one();
        });
        Ok(Self { task })
    }

    /// Whether it accepts queries, or has ended less than [`RESTART_DELAY`] ago.
    pub(in crate::shim::network) fn is_running(&self) -> bool {
        !self.task.is_finished()
    }
}

impl Drop for NameRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Relays until the guest closes the stream.
async fn relay(mut queries: OwnedReadHalf, answers: OwnedWriteHalf, namespace: Arc<OwnedFd>) -> io::Result<()> {
    let answers = Arc::new(Mutex::new(answers));
    let permits = Arc::new(Semaphore::new(MAX_NAME_QUERIES));
    let mut frames = FrameBuffer::new(MAX_NAME_FRAME);
    let mut bytes = vec![0; READ_SIZE];
    loop {
        let count = queries.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        frames.push(&bytes[..count]);
        while let Some(query) = frames.next::<NameQuery>().map_err(io::Error::other)? {
            // The agent does not exceed the limit.
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                continue;
            };
            let (answers, namespace) = (answers.clone(), namespace.clone());
            tokio::spawn(async move {
                if let Err(error) = answer(query, &answers, &namespace).await {
                    log::debug!("cannot relay a DNS query of the guest: {error}");
                }
                drop(permit);
            });
        }
    }
}

async fn answer(query: NameQuery, answers: &Mutex<OwnedWriteHalf>, namespace: &OwnedFd) -> io::Result<()> {
    let id = query.id;
    let asked = run_in_namespace(namespace, move || ask(DOCKER_RESOLVER, query.tcp, &query.message));
    let message = asked.await.map_err(io::Error::other)??;
    let frame = encode(&NameAnswer { id, message }, MAX_NAME_FRAME).map_err(io::Error::other)?;
    // Ends when the vmm has closed the stream, whether the guest reads or not.
    answers.lock().await.write_all(&frame).await
}

/// Asks a resolver in the calling thread's network namespace. Blocks for a limited time.
fn ask(resolver: SocketAddrV4, tcp: bool, query: &[u8]) -> io::Result<Vec<u8>> {
    if tcp {
        let mut socket = TcpStream::connect_timeout(&resolver.into(), ANSWER_TIMEOUT)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let length = u16::try_from(query.len()).map_err(io::Error::other)?;
        socket.write_all(&[&length.to_be_bytes(), query].concat())?;
        let mut length = [0; 2];
        socket.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        socket.read_exact(&mut answer)?;
        Ok(answer)
    } else {
        // The kernel assigns a random port, and a connected socket receives nothing from others.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(resolver)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.send(query)?;
        let mut answer = vec![0; MAX_MESSAGE];
        let count = socket.recv(&mut answer)?;
        answer.truncate(count);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, process::Command, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn resolver_is_found_by_its_address_on_any_port() {
        let header =
            "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let socket =
            |local| format!("{header}  100: {local} 00000000:0000 07 00000000:00000000 00:00000000 0 0 1 2 0 0\n");
        for (sockets, found) in [
            (header.to_owned(), false),
            (socket("0B00007F:A0C3"), true),
            (socket("0100007F:0035"), false),
            (socket("00000000:0035"), false),
            (format!("{}{}", socket("0100007F:0035"), socket("0B00007F:0001")), true),
        ] {
            assert_eq!(lists_resolver(&sockets), found, "{sockets}");
        }
    }

    #[tokio::test]
    async fn queries_are_answered_by_the_resolver_in_the_namespace() {
        // A namespace without the resolver, then one with it.
        let namespace = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(status.success() && !has_resolver().unwrap());
            let udp = UdpSocket::bind(DOCKER_RESOLVER).unwrap();
            assert!(has_resolver().unwrap());
            thread::spawn(move || {
                let mut bytes = [0; 64];
                while let Ok((count, from)) = udp.recv_from(&mut bytes) {
                    if &bytes[..count] == b"last" {
                        return;
                    }
                    udp.send_to(&[b"answer to ", &bytes[..count]].concat(), from).unwrap();
                }
            });
            OwnedFd::from(fs::File::open("/proc/thread-self/ns/net").unwrap())
        });
        let namespace = namespace.join().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (queries, answers) = theirs.into_split();
        let relay = tokio::spawn(relay(queries, answers, Arc::new(namespace)));
        let (mut reader, mut writer) = ours.into_split();

        let mut send = async |id, message: &[u8]| {
            let message = message.to_vec();
            let query = NameQuery {
                id,
                tcp: false,
                message,
            };
            writer
                .write_all(&encode(&query, MAX_NAME_FRAME).unwrap())
                .await
                .unwrap();
        };
        send(1, b"one").await;
        send(2, b"two").await;
        let mut frames = FrameBuffer::new(MAX_NAME_FRAME);
        let mut received = Vec::new();
        while received.len() < 2 {
            let mut bytes = [0; 64];
            let count = reader.read(&mut bytes).await.unwrap();
            frames.push(&bytes[..count]);
            while let Some(NameAnswer { id, message }) = frames.next().unwrap() {
                received.push((id, message));
            }
        }
        received.sort();
        assert_eq!(
            received,
            [(1, b"answer to one".to_vec()), (2, b"answer to two".to_vec())]
        );

        // Ends the resolver, and the relay.
        send(3, b"last").await;
        drop(writer);
        relay.await.unwrap().unwrap();
    }

    #[test]
    fn resolver_is_asked_with_the_transport_of_the_query() {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = |address: std::net::SocketAddr| SocketAddrV4::new(Ipv4Addr::LOCALHOST, address.port());
        let (udp_address, tcp_address) = (port(udp.local_addr().unwrap()), port(tcp.local_addr().unwrap()));
        let server = thread::spawn(move || {
            let mut bytes = [0; 64];
            let (count, from) = udp.recv_from(&mut bytes).unwrap();
            udp.send_to(&[b"udp ", &bytes[..count]].concat(), from).unwrap();
            let (mut socket, _) = tcp.accept().unwrap();
            socket.read_exact(&mut bytes[..7]).unwrap();
            assert_eq!(&bytes[..7], b"\0\x05query");
            socket.write_all(b"\0\x09tcp query").unwrap();
        });
        assert_eq!(ask(udp_address, false, b"query").unwrap(), b"udp query");
        assert_eq!(ask(tcp_address, true, b"query").unwrap(), b"tcp query");
        server.join().unwrap();
    }
}
