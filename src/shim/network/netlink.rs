//! One rtnetlink(7) socket: requests and their answers, one after the other. The kernel answers
//! within the call that asks, so that nothing here waits.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// The largest packet of a dump is 32 KiB (`NLMSG_GOODSIZE` and what a reader offers).
const BUFFER: usize = 64 << 10;

/// How often a dump is taken again because something changed meanwhile.
const MAX_DUMP_ATTEMPTS: usize = 8;

/// What fails on the socket.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(crate) struct NetlinkError {
    /// What was asked for.
    what: String,
    /// The kernel's answer, or why there is none.
    source: io::Error,
}

impl NetlinkError {
    /// `what` failed.
    pub(super) fn new(what: &str, source: io::Error) -> Self {
        Self {
            what: what.to_owned(),
            source,
        }
    }

    /// The kernel's error number.
    pub(super) fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// The socket. It belongs to the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// In the calling thread's namespace.
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

    /// All that the kernel has of what `question` asks for.
    pub(super) fn dump(
        &mut self,
        what: &str,
        question: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..MAX_DUMP_ATTEMPTS {
            self.send(question.clone(), NLM_F_DUMP)
                .map_err(|source| NetlinkError::new(what, source))?;
            if let Some(found) = self.collect().map_err(|source| NetlinkError::new(what, source))? {
                return Ok(found);
            }
        }
        Err(NetlinkError::new(
            what,
            io::Error::other("the namespace keeps changing"),
        ))
    }

    /// Asks for a change, with `flags` (`NLM_F_CREATE` and its like).
    pub(super) fn change(&mut self, what: &str, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_ACK | flags)
            .and_then(|()| self.collect())
            .map_err(|source| NetlinkError::new(what, source))?;
        Ok(())
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = serialize(message, flags, self.sequence);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Reads the answer to its end; `None` if what it says did not all hold at one time.
    fn collect(&self) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        let mut buffer = vec![0; BUFFER];
        let mut found = Vec::new();
        let mut whole = true;
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
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(found)),
                    NetlinkPayload::Error(answer) => {
                        return match answer.code {
                            None => Ok(Some(found)),
                            Some(_) => Err(answer.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    _ => {}
                }
            }
        }
    }
}

/// A whole request.
pub(super) fn serialize(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    bytes
}
