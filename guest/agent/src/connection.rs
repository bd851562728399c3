//! The way to the host: one control stream, and a stream for each standard stream of a process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nutshell_protocol::{AGENT_PORT, FrameBuffer, FrameError, FromAgent, HOST_CID, ToAgent, encode};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::VsockAddress;

/// Where the host listens.
#[derive(Debug, Clone)]
pub(crate) enum HostAddress {
    /// The machine's virtio-vsock device.
    Vsock,
    /// Sockets `<folder>/<port>`: how tests stand in for a host.
    Unix(PathBuf),
}

impl HostAddress {
    /// Opens a stream that does not block. It may still be on its way: see [`is_connected`].
    pub(crate) fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, result) = match self {
            Self::Vsock => {
                let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
                let address = VsockAddress { cid: HOST_CID, port };
                let result = rustix::net::connect(&socket, &address);
                (socket, result)
            }
            Self::Unix(folder) => {
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let address = SocketAddrUnix::new(folder.join(port.to_string()))?;
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

/// Whether a dialled stream carries bytes yet; an error if the host refused it.
pub(crate) fn is_connected(stream: impl AsFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_error(&stream)??;
    match rustix::net::getpeername(&stream) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        // The address is of a family that rustix does not decode, but it is there.
        Err(_) => Ok(true),
    }
}

/// How long the host may take to answer a dial. The kernel gives up by itself after two seconds
/// (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
const CONNECT_TIMEOUT: Timespec = Timespec { tv_sec: 4, tv_nsec: 0 };

/// Waits until a stream that was dialled carries bytes.
pub(crate) fn await_connection(stream: &OwnedFd) -> io::Result<()> {
    if !is_connected(stream)? {
        let mut answer = [PollFd::new(stream, PollFlags::OUT)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut answer, Some(&CONNECT_TIMEOUT)))?;
        if !is_connected(stream)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Why the agent has no host any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// The stream ended.
    #[error("the host closed the control stream")]
    Closed,
    /// What arrived is no message.
    #[error("the host sent what is no request: {0}")]
    Frame(#[from] FrameError),
    /// The stream broke.
    #[error("the control stream broke: {0}")]
    Stream(#[from] io::Error),
}

/// The control stream.
#[derive(Debug)]
pub(crate) struct ControlStream {
    stream: OwnedFd,
    incoming: FrameBuffer,
    outgoing: Vec<u8>,
}

/// How much is read from the control stream at once.
const READ_SIZE: usize = 16 << 10;

impl ControlStream {
    /// Dials the host and waits until it takes the call.
    pub(crate) fn dial(host: &HostAddress) -> io::Result<Self> {
        let stream = host.dial(AGENT_PORT)?;
        let mut ready = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::OUT)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, None))?;
        rustix::net::sockopt::socket_error(&stream)??;
        Ok(Self {
            stream,
            incoming: FrameBuffer::default(),
            outgoing: Vec::new(),
        })
    }

    /// The next request, or `None` until more arrives.
    pub(crate) fn next(&mut self) -> Result<Option<ToAgent>, ControlError> {
        loop {
            if let Some(message) = self.incoming.next()? {
                return Ok(Some(message));
            }
            let mut bytes = [0; READ_SIZE];
            match rustix::io::read(&self.stream, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET) => return Err(ControlError::Closed),
                Ok(read) => self.incoming.push(&bytes[..read]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(ControlError::Stream(error.into())),
            }
        }
    }

    /// Queues a message and sends what the stream takes.
    pub(crate) fn send(&mut self, message: &FromAgent) -> Result<(), ControlError> {
        self.outgoing.extend(encode(message)?);
        self.flush()
    }

    /// Sends what is queued, as far as the stream takes it.
    pub(crate) fn flush(&mut self) -> Result<(), ControlError> {
        let mut sent = 0;
        while sent < self.outgoing.len() {
            match rustix::net::send(&self.stream, &self.outgoing[sent..], SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ControlError::Closed),
                Err(error) => return Err(ControlError::Stream(error.into())),
            }
        }
        self.outgoing.drain(..sent);
        Ok(())
    }

    /// How many bytes the host has not taken yet.
    pub(crate) fn backlog(&self) -> usize {
        self.outgoing.len()
    }
}

impl AsFd for ControlStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
