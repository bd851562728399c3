//! The socket of the control channel: a `SOCK_SEQPACKET` socketpair. Each packet contains one message, and its
//! descriptors as ancillary data (`SCM_RIGHTS`). The vmm has its end on descriptor 0.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// The maximum size of a packet in bytes. The largest part of a packet is the console tail.
const MAX_PACKET_SIZE: usize = 64 << 10;

/// The maximum number of descriptors in a packet: the kernel's limit (`SCM_MAX_FD`).
pub(crate) const MAX_DESCRIPTORS: usize = 253;

/// Why a message cannot be sent or received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the process at the other end of the control channel is gone")]
    Closed,
    #[error("cannot encode a message for the control channel: {0}")]
    Encode(#[source] postcard::Error),
    #[error(
        "a message of {bytes} bytes with {descriptors} descriptors is too large for the control channel: at most \
         {MAX_PACKET_SIZE} bytes and {MAX_DESCRIPTORS} descriptors"
    )]
    TooLarge { bytes: usize, descriptors: usize },
    #[error("received a truncated message on the control channel")]
    Truncated,
    #[error("cannot decode a message from the control channel: {0}")]
    Decode(#[source] postcard::Error),
    #[error("control channel: cannot {step}: {source}")]
    Socket { step: &'static str, source: io::Error },
    /// The socket of a stream, and not the control channel.
    #[error("cannot open a stream to the guest: {0}")]
    Stream(#[source] io::Error),
}

impl ControlError {
    /// A failure of the channel's own socket.
    pub(crate) fn socket<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Socket {
            step,
            source: source.into(),
        }
    }

    /// Whether a non-blocking channel has no message, or no room for one.
    pub(crate) fn is_would_block(&self) -> bool {
        self.has_kind(io::ErrorKind::WouldBlock)
    }

    fn has_kind(&self, kind: io::ErrorKind) -> bool {
        matches!(self, Self::Socket { source, .. } if source.kind() == kind)
    }
}

/// One end of the control channel. Its descriptor is close-on-exec.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Creates a channel and returns both ends.
    pub(crate) fn pair() -> Result<(Self, Self), ControlError> {
        let (left, right) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(ControlError::socket("create it"))?;
        Ok((Self { socket: left }, Self { socket: right }))
    }

    /// Duplicates this end, so that another thread can send.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        Ok(Self { socket })
    }

    /// Sends `message` with `descriptors`. Blocks while the socket's buffer is full, unless the socket is non-blocking.
    pub(crate) fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send_packet(message, descriptors, MsgFlags::empty())
    }

    /// Like [`Self::send`], but never blocks: if the socket's buffer is full, it fails with [`ControlError::Socket`]
    /// (`WouldBlock`).
    pub(crate) fn send_without_blocking(&self, message: &impl Serialize) -> Result<(), ControlError> {
        self.send_packet(message, &[], MsgFlags::MSG_DONTWAIT)
    }

    fn send_packet(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), ControlError> {
        let packet = postcard::to_stdvec(message).map_err(ControlError::Encode)?;
        if packet.len() > MAX_PACKET_SIZE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(ControlError::TooLarge {
                bytes: packet.len(),
                descriptors: descriptors.len(),
            });
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[io::IoSlice::new(&packet)],
            if raw.is_empty() { &[] } else { &rights },
            MsgFlags::MSG_NOSIGNAL | flags,
            None,
        )
        .map_err(|error| match error {
            Errno::EPIPE | Errno::ECONNRESET => ControlError::Closed,
            error => ControlError::socket("send a message")(error),
        })?;
        Ok(())
    }

    /// Receives one message and its descriptors, which are close-on-exec. If the socket is non-blocking and there is no
    /// message, it fails with [`ControlError::Socket`] (`WouldBlock`).
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ControlError> {
        match self.receive_packet(MsgFlags::empty()) {
            // If the other end was closed while it had unread messages, the kernel first reports ECONNRESET, once. Read
            // again to receive the messages that the other end sent before.
            Err(error) if error.has_kind(io::ErrorKind::ConnectionReset) => self.receive_packet(MsgFlags::empty()),
            other => other,
        }
    }

    /// Like [`Self::receive`], but returns `None` at once if there is no message.
    pub(crate) fn try_receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        match self.receive_packet(MsgFlags::MSG_DONTWAIT) {
            Err(error) if error.is_would_block() => Ok(None),
            other => other.map(Some),
        }
    }

    fn receive_packet<T: DeserializeOwned>(&self, flags: MsgFlags) -> Result<(T, Vec<OwnedFd>), ControlError> {
        let mut packet = vec![0; MAX_PACKET_SIZE];
        let mut ancillary = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut vectors = [io::IoSliceMut::new(&mut packet)];
        let received = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut vectors,
            Some(&mut ancillary),
            MsgFlags::MSG_CMSG_CLOEXEC | flags,
        )
        .map_err(ControlError::socket("receive a message"))?;
        let mut descriptors = Vec::new();
        let ancillary = received
            .cmsgs()
            .map_err(ControlError::socket("read the descriptors of a message"))?;
        for message in ancillary {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just created these descriptors in this process, and nothing else owns them.
                descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let (length, truncated) = (
            received.bytes,
            received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC),
        );
        if length == 0 {
            return Err(ControlError::Closed);
        }
        if truncated {
            return Err(ControlError::Truncated);
        }
        let message = postcard::from_bytes(&packet[..length]).map_err(ControlError::Decode)?;
        Ok((message, descriptors))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;
    use crate::control::{Command, Notice};

    #[test]
    fn descriptor_sent_with_a_command_is_the_same_file() {
        let (shim, vmm) = Channel::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let command = Command::OpenStream {
            port: 1024,
            input: true,
            output: false,
        };
        shim.send(&command, &[reader.as_fd()]).unwrap();
        drop((reader, shim));

        let (received, mut descriptors) = vmm.receive::<Command>().unwrap();

        assert!(matches!(received, Command::OpenStream { port: 1024, .. }));
        io::Write::write_all(&mut { writer }, b"x").unwrap();
        let mut bytes = Vec::new();
        File::from(descriptors.remove(0)).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"x");
        assert!(matches!(vmm.receive::<Command>(), Err(ControlError::Closed)));
    }

    #[test]
    fn final_message_is_received_even_if_its_sender_left_messages_unread() {
        let (shim, vmm) = Channel::pair().unwrap();
        shim.send(&Command::ReadConsole, &[]).unwrap();
        vmm.send(&Notice::Drained { port: 7 }, &[]).unwrap();
        drop(vmm);

        let last = shim.receive::<Notice>();

        assert!(matches!(last, Ok((Notice::Drained { port: 7 }, _))), "{last:?}");
        assert!(matches!(shim.receive::<Notice>(), Err(ControlError::Closed)));
    }

    #[test]
    fn undecodable_packet_is_an_error_with_its_cause() {
        let (shim, vmm) = Channel::pair().unwrap();
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&shim.as_fd()),
            &[0xff; 9],
            MsgFlags::empty(),
        )
        .unwrap();
        assert!(matches!(vmm.receive::<Command>(), Err(ControlError::Decode(_))));
    }

    #[test]
    fn message_that_is_too_large_is_refused_with_its_size() {
        let (shim, _vmm) = Channel::pair().unwrap();
        let error = shim.send(&vec![1u8; MAX_PACKET_SIZE], &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a message of 65539 bytes with 0 descriptors is too large for the control channel: at most 65536 bytes and \
             253 descriptors"
        );
    }
}
