//! An rtnetlink(7) socket: requests and their responses, one after the other. The kernel responds within the call that
//! sends the request, so nothing here blocks.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// In bytes. A packet of a dump has at most 32 KiB (kernel, `netlink_dump`).
const RECEIVE_BUFFER_SIZE: usize = 64 << 10;

/// Maximum number of attempts at a dump that changes interrupt.
const MAX_DUMP_ATTEMPTS: usize = 8;

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub(crate) struct NetlinkError {
    /// The purpose of the request, as an infinitive.
    action: String,
    source: io::Error,
}

impl NetlinkError {
    pub(super) fn new(action: &str, source: io::Error) -> Self {
        Self {
            action: action.to_owned(),
            source,
        }
    }

    /// The kernel's error number, if the kernel refused the request.
    pub(super) fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// A socket for one network namespace.
#[derive(Debug)]
pub(super) struct NetlinkSocket {
    socket: OwnedFd,
    /// The sequence number of the last request.
    sequence: u32,
}

impl NetlinkSocket {
    /// Opens a socket for the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        );
        let socket = socket.map_err(|errno| NetlinkError::new("open a netlink socket", errno.into()))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends the dump request `request` and returns a consistent list of objects. `action` is for errors.
    pub(super) fn dump(
        &mut self,
        action: &str,
        request: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..MAX_DUMP_ATTEMPTS {
            self.send(request.clone(), NLM_F_DUMP)
                .map_err(|source| NetlinkError::new(action, source))?;
            let messages = self.receive().map_err(|source| NetlinkError::new(action, source))?;
            if let Some(messages) = messages {
                return Ok(messages);
            }
        }
        Err(NetlinkError::new(
            action,
            io::Error::other("the namespace keeps changing"),
        ))
    }

    /// Requests a change, with `flags` such as `NLM_F_CREATE`. `action` is for errors.
    pub(super) fn change(
        &mut self,
        action: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_ACK | flags)
            .and_then(|()| self.receive())
            .map_err(|source| NetlinkError::new(action, source))?;
        Ok(())
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = serialize_request(message, flags, self.sequence);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Receives the whole response to the last request. `None` if a change interrupted a dump.
    fn receive(&self) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        let mut buffer = vec![0; RECEIVE_BUFFER_SIZE];
        let mut messages = Vec::new();
        let mut consistent = true;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                // Messages are aligned to four bytes.
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(consistent.then_some(messages)),
                    NetlinkPayload::Error(error) => {
                        // Without a code it is an acknowledgement.
                        return match error.code {
                            None => Ok(Some(messages)),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(message) => messages.push(message),
                    _ => {}
                }
            }
        }
    }
}

/// The bytes of a request, with its header.
pub(super) fn serialize_request(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    bytes
}
