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
    /// The destination has been shut down, too.
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
        self.start < self.end
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
        let mut ends = [
            PollFd::new(stream, interest(&inward, &outward)),
            PollFd::new(socket, interest(&outward, &inward)),
        ];
        // poll(2) reports a connection that is closed in both directions even if `events` is empty.
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends, None))?;
        let has_failed = |end: &PollFd<'_>| end.revents().intersects(PollFlags::ERR | PollFlags::NVAL);
        if ends.iter().any(has_failed) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
    }
}
