//! Forwards connections from the host to ports of the pod. A separate process relays each connection and ends with it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nutshell_protocol::Failure;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::connection::await_connection;
use crate::failure::Context;
use crate::sys;

/// The size of the buffer of each direction, in bytes.
const BUFFER_SIZE: usize = 64 << 10;

/// The maximum time to connect. On the loopback interface, only a full backlog causes a delay.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to the first of `targets` that accepts, and forks a process that relays bytes between that connection and
/// `stream`. Call this in a job.
pub(crate) fn start(stream: &OwnedFd, targets: &[SocketAddr]) -> Result<(), Failure> {
    let socket = connect(targets).context(|| format!("connect to {targets:?} in the pod"))?;
    let socket = OwnedFd::from(socket);
    // `stream` has been connecting in the meantime.
    await_connection(stream).context(|| "wait for the stream to the host to connect".to_owned())?;
    for end in [stream, &socket] {
        rustix::io::ioctl_fionbio(end, true)
            .map_err(io::Error::from)
            .context(|| "set a socket to non-blocking".to_owned())?;
    }
    if sys::fork()
        .context(|| "fork the process that forwards the connection".to_owned())?
        .is_some()
    {
        return Ok(());
    }
    sys::close_all_but(&[stream.as_fd(), socket.as_fd()]);
    // The exit status of this process is not used: both peers see that their connections are closed.
    sys::exit_now(relay(stream, &socket).is_err().into())
}

fn connect(targets: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last_error = io::ErrorKind::InvalidInput.into();
    for target in targets {
        match TcpStream::connect_timeout(target, CONNECT_TIMEOUT) {
            Ok(socket) => return Ok(socket),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// One direction of a relayed connection, with the bytes that were read and not yet written.
struct Direction<'a> {
    from: BorrowedFd<'a>,
    to: BorrowedFd<'a>,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    state: DirectionState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DirectionState {
    Open,
    /// The source has ended; buffered bytes are yet to be written.
    Draining,
    /// The destination has been shut down, too, or accepts nothing any more.
    Closed,
}

impl<'a> Direction<'a> {
    fn new(from: &'a OwnedFd, to: &'a OwnedFd) -> Self {
        Self {
            from: from.as_fd(),
            to: to.as_fd(),
            bytes: vec![0; BUFFER_SIZE].into_boxed_slice(),
            start: 0,
            end: 0,
            state: DirectionState::Open,
        }
    }

    fn has_data(&self) -> bool {
        self.state != DirectionState::Closed && self.start < self.end
    }

    /// Moves bytes until a read or write would block or the direction is closed.
    fn transfer(&mut self) -> io::Result<()> {
        while self.state != DirectionState::Closed {
            let moved = if self.has_data() {
                rustix::io::write(self.to, &self.bytes[self.start..self.end]).map(|count| self.start += count)
            } else if self.state == DirectionState::Draining {
                self.state = DirectionState::Closed;
                rustix::net::shutdown(self.to, rustix::net::Shutdown::Write)
            } else {
                rustix::io::read(self.from, &mut self.bytes[..]).map(|count| {
                    (self.start, self.end) = (0, count);
                    if count == 0 {
                        self.state = DirectionState::Draining;
                    }
                })
            };
            match moved {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Relays bytes until both directions are closed or one fails.
fn relay(stream: &OwnedFd, socket: &OwnedFd) -> io::Result<()> {
    let (mut inward, mut outward) = (Direction::new(stream, socket), Direction::new(socket, stream));
    let mut hung_up = [false; 2];
    loop {
        inward.transfer()?;
        outward.transfer()?;
        if inward.state == DirectionState::Closed && outward.state == DirectionState::Closed {
            return Ok(());
        }
        let interest = |reads: &Direction<'_>, writes: &Direction<'_>| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, reads.state == DirectionState::Open && !reads.has_data());
            flags.set(PollFlags::OUT, writes.has_data());
            flags
        };
        let ends = [
            (stream, interest(&inward, &outward)),
            (socket, interest(&outward, &inward)),
        ];
        // poll(2) reports a connection that is closed in both directions even if `events` is empty, each time.
        let (watched, mut polled): (Vec<_>, Vec<_>) = ends
            .into_iter()
            .zip(&mut hung_up)
            .filter(|((_, events), hung_up)| !events.is_empty() || !**hung_up)
            .map(|((end, events), hung_up)| (hung_up, PollFd::new(end, events)))
            .unzip();
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
        for (hung_up, end) in watched.into_iter().zip(&polled) {
            if end.revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            *hung_up |= end.revents().contains(PollFlags::HUP);
        }
        // Such a connection accepts nothing, but may still have bytes to read.
        for (hung_up, writes) in hung_up.iter().zip([&mut outward, &mut inward]) {
            if *hung_up {
                writes.state = DirectionState::Closed;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::thread;

    use rustix::net::sockopt::set_socket_send_buffer_size;
    use rustix::time::{ClockId, clock_gettime};

    const LIMIT: Duration = Duration::from_secs(30);

    /// The size of the send buffer between the relay and the server, in bytes. Linux doubles it.
    const SEND_BUFFER_SIZE: usize = 8 << 10;

    /// More than the relay and the send buffer to the server hold, and less than the send buffer of the client, in
    /// bytes.
    const UNREAD: usize = BUFFER_SIZE + (32 << 10);

    /// Starts a relay between a client and a server. At its end it sends its result and the CPU time that it used.
    fn start_relay() -> (UnixStream, UnixStream, Receiver<(io::Result<()>, Duration)>) {
        let ((client, stream), (server, socket)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for end in [&stream, &socket] {
            end.set_nonblocking(true).unwrap();
        }
        set_socket_send_buffer_size(&socket, SEND_BUFFER_SIZE).unwrap();
        for end in [&client, &server] {
            end.set_read_timeout(Some(LIMIT)).unwrap();
            end.set_write_timeout(Some(LIMIT)).unwrap();
        }
        let (ended, end) = channel();
        thread::spawn(move || {
            let result = relay(&stream.into(), &socket.into());
            let cpu_time = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
            ended.send((result, cpu_time)).unwrap();
        });
        (client, server, end)
    }

    #[test]
    fn relay_uses_no_cpu_time_while_the_receiver_of_a_closed_connection_does_not_read() {
        let (mut client, mut server, end) = start_relay();
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        client.write_all(&[1; UNREAD]).unwrap();
        drop(client);

        let waited = Duration::from_millis(500);
        assert_eq!(end.recv_timeout(waited).unwrap_err(), RecvTimeoutError::Timeout);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();

        assert_eq!(rest.len(), UNREAD);
        let (result, cpu_time) = end.recv_timeout(LIMIT).unwrap();
        result.unwrap();
        assert!(cpu_time < waited / 4, "{cpu_time:?}");
    }

    #[test]
    fn relay_ends_when_the_client_closes_although_the_server_is_silent() {
        let (mut client, mut server, end) = start_relay();
        client.write_all(b"last words").unwrap();
        drop(client);
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        end.recv_timeout(LIMIT).unwrap().0.unwrap();
    }

    #[test]
    fn answer_arrives_after_the_client_has_ended_its_request() {
        let (mut client, mut server, end) = start_relay();
        client.write_all(b"request").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        server.write_all(b"answer").unwrap();
        drop(server);
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "requestanswer");
        end.recv_timeout(LIMIT).unwrap().0.unwrap();
    }
}
