//! Connections to the host: the agent stream, and one stream for each standard stream of a process and each
//! forwarded connection.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nutshell_protocol::{
    AGENT_PORT, FrameBuffer, FrameError, FromAgent, HOST_CID, LAST_RESERVED_PORT, MAX_FROM_AGENT, MAX_TO_AGENT,
    ToAgent, encode,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::VsockAddress;

/// The address at which the host listens.
#[derive(Debug, Clone)]
pub(crate) enum HostAddress {
    /// Vsock ports of the host.
    Vsock,
    /// Unix sockets `<directory>/<port>`, for tests.
    Unix(PathBuf),
}

impl HostAddress {
    /// Starts to connect to a port, without blocking. See [`is_connected`] for the result.
    pub(crate) fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, result) = match self {
            Self::Vsock => {
                let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
                if port == AGENT_PORT {
                    bind_reserved_port(&socket)?;
                }
                let address = VsockAddress { cid: HOST_CID, port };
                let result = rustix::net::connect(&socket, &address);
                (socket, result)
            }
            Self::Unix(directory) => {
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let address = SocketAddrUnix::new(directory.join(port.to_string()))?;
                let result = rustix::net::connect(&socket, &address);
                (socket, result)
            }
        };
        match result {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
            Err(error) => Err(error.into()),
        }
    }
}

/// Binds a vsock socket to a free reserved port, which proves to the host that the process is privileged.
fn bind_reserved_port(socket: &OwnedFd) -> io::Result<()> {
    /// `VMADDR_CID_ANY` (vsock(7)).
    const ANY_CID: u32 = u32::MAX;
    let mut result = Err(Errno::ADDRINUSE);
    for port in (1..=LAST_RESERVED_PORT).rev() {
        result = rustix::net::bind(socket, &VsockAddress { cid: ANY_CID, port });
        if result != Err(Errno::ADDRINUSE) {
            break;
        }
    }
    Ok(result?)
}

/// Whether a stream is connected. Fails if the host refused the connection.
pub(crate) fn is_connected(stream: impl AsFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_error(&stream)??;
    match rustix::net::getpeername(&stream) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        // There is a peer address, but rustix cannot decode its family.
        Err(_) => Ok(true),
    }
}

/// The maximum time for the host to accept a connection. For vsock, the kernel has a limit of two seconds
/// (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
const CONNECT_TIMEOUT: Timespec = Timespec { tv_sec: 4, tv_nsec: 0 };

/// Waits until a stream is connected.
pub(crate) fn await_connection(stream: &OwnedFd) -> io::Result<()> {
    if !is_connected(stream)? {
        let mut poll_fds = [PollFd::new(stream, PollFlags::OUT)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll_fds, Some(&CONNECT_TIMEOUT)))?;
        if !is_connected(stream)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Why the agent stream cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentStreamError {
    /// The host closed it.
    #[error("the host closed the agent stream")]
    Closed,
    /// The host sent something that is not a request, or a message of the agent is too long.
    #[error("invalid message on the agent stream: {0}")]
    Frame(#[from] FrameError),
    /// Reading or writing failed.
    #[error("the agent stream failed: {0}")]
    Io(#[from] io::Error),
}

/// The agent stream, which carries the messages of `nutshell_protocol`.
#[derive(Debug)]
pub(crate) struct AgentStream {
    stream: OwnedFd,
    incoming: FrameBuffer,
    outgoing: Vec<u8>,
}

/// The maximum number of bytes in one read of the agent stream.
const READ_SIZE: usize = 16 << 10;

impl AgentStream {
    /// Connects to the host, and waits until the host accepts the connection.
    pub(crate) fn dial(host: &HostAddress) -> io::Result<Self> {
        let stream = host.dial(AGENT_PORT)?;
        let mut ready = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::OUT)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, None))?;
        rustix::net::sockopt::socket_error(&stream)??;
        Ok(Self {
            stream,
            incoming: FrameBuffer::new(MAX_TO_AGENT),
            outgoing: Vec::new(),
        })
    }

    /// Returns the next request, or `None` if none has arrived completely.
    pub(crate) fn next(&mut self) -> Result<Option<ToAgent>, AgentStreamError> {
        loop {
            if let Some(message) = self.incoming.next()? {
                return Ok(Some(message));
            }
            let mut bytes = [0; READ_SIZE];
            match rustix::io::read(&self.stream, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET) => return Err(AgentStreamError::Closed),
                Ok(read) => self.incoming.push(&bytes[..read]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(AgentStreamError::Io(error.into())),
            }
        }
    }

    /// Queues a message, and sends as much of the queue as the stream accepts.
    pub(crate) fn send(&mut self, message: &FromAgent) -> Result<(), AgentStreamError> {
        self.outgoing.extend(encode(message, MAX_FROM_AGENT)?);
        self.flush()
    }

    /// Sends as much of the queue as the stream accepts.
    pub(crate) fn flush(&mut self) -> Result<(), AgentStreamError> {
        let mut sent = 0;
        while sent < self.outgoing.len() {
            match rustix::net::send(&self.stream, &self.outgoing[sent..], SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(AgentStreamError::Closed),
                Err(error) => return Err(AgentStreamError::Io(error.into())),
            }
        }
        self.outgoing.drain(..sent);
        Ok(())
    }

    /// The number of queued bytes.
    pub(crate) fn backlog(&self) -> usize {
        self.outgoing.len()
    }
}

impl AsFd for AgentStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
