//! The frontend's end of a vhost-user connection: sends requests, and receives replies within a time limit. The
//! frontend of the `vhost` crate waits without limit, and tries again when the socket reports a timeout.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES};

/// How long the backend may take to reply. Less than the limit of the shim for an answer of the vmm (`VMM_TIMEOUT`), so
/// that the shim gets the error.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// Version 1 of the protocol, in the flags of a header.
const VERSION: u32 = 1;

/// The flag of a reply in the flags of a header.
const REPLY: u32 = 1 << 2;

/// The size of a header in bytes: request, flags, and the size of the body, each with 32 bits.
const HEADER_SIZE: usize = 12;

/// The size in bytes of the body of a reply: 64 bits.
const BODY_SIZE: u8 = 8;

pub(super) const REPLY_SIZE: usize = HEADER_SIZE + BODY_SIZE as usize;

#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("{request:?}: cannot send the request: {source}")]
    Send {
        request: FrontendReq,
        #[source]
        source: io::Error,
    },
    #[error("{request:?}: cannot receive the reply: {source}")]
    Receive {
        request: FrontendReq,
        #[source]
        source: io::Error,
    },
    #[error("{0:?}: the file server does not reply: it hangs")]
    Timeout(FrontendReq),
    #[error("{0:?}: the file server has closed the connection")]
    Closed(FrontendReq),
    #[error("{0:?}: the reply is malformed")]
    Malformed(FrontendReq),
}

#[derive(Debug)]
pub(super) struct Connection(UnixStream);

impl Connection {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Sends a request without a reply. Never blocks: a socket whose buffer is full is an error.
    pub(super) fn send(
        &self,
        request: FrontendReq,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let failed = |source| ConnectionError::Send { request, source };
        let size = u32::try_from(body.len()).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let mut message = [u32::from(request), VERSION, size].map(u32::to_ne_bytes).concat();
        message.extend_from_slice(body);

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let sent = rustix::io::retry_on_intr(|| {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            rustix::net::sendmsg(&self.0, &[IoSlice::new(&message)], &mut ancillary, flags)
        });
        match sent {
            Ok(length) if length == message.len() => Ok(()),
            Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Sends a request without a body, and returns the 64 bits of its reply.
    pub(super) fn read_u64(&self, request: FrontendReq) -> Result<u64, ConnectionError> {
        self.send(request, &[], &[])?;
        let deadline = Instant::now() + REPLY_LIMIT;
        let mut reply = [0; REPLY_SIZE];
        let mut filled = 0;
        while filled < REPLY_SIZE {
            self.wait_until_readable(request, deadline)?;
            filled += self.receive(request, &mut reply[filled..])?;
        }
        let field = |at: usize| u32::from_ne_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]]);
        let expected = [u32::from(request), VERSION | REPLY, BODY_SIZE.into()];
        if [field(0), field(4), field(8)] != expected {
            return Err(ConnectionError::Malformed(request));
        }
        let body = reply.last_chunk().copied().unwrap_or_default();
        Ok(u64::from_ne_bytes(body))
    }

    fn wait_until_readable(&self, request: FrontendReq, deadline: Instant) -> Result<(), ConnectionError> {
        let mut sources = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| {
            let rest = deadline.saturating_duration_since(Instant::now());
            let rest = Timespec {
                tv_sec: rest.as_secs().cast_signed(),
                tv_nsec: rest.subsec_nanos().into(),
            };
            rustix::event::poll(&mut sources, Some(&rest))
        });
        match ready {
            Ok(0) => Err(ConnectionError::Timeout(request)),
            Ok(_) => Ok(()),
            Err(error) => Err(ConnectionError::Receive {
                request,
                source: error.into(),
            }),
        }
    }

    /// Returns the number of bytes received, which may be 0 if there are none.
    fn receive(&self, request: FrontendReq, buffer: &mut [u8]) -> Result<usize, ConnectionError> {
        let mut vectors = [IoSliceMut::new(buffer)];
        let mut no_descriptors = RecvAncillaryBuffer::default();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(&self.0, &mut vectors, &mut no_descriptors, flags) {
            Ok(received) if received.bytes == 0 => Err(ConnectionError::Closed(request)),
            Ok(received) => Ok(received.bytes),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(ConnectionError::Receive {
                request,
                source: error.into(),
            }),
        }
    }
}
