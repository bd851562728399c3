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
    #[error("a packet of the control channel is malformed or too large")]
    Malformed,
    #[error("the control channel failed: {0}")]
    Socket(#[source] io::Error),
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
            .map_err(|error| ControlError::Socket(error.into()))?;
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
        let packet = postcard::to_stdvec(message).map_err(|_| ControlError::Malformed)?;
        if packet.len() > MAX_PACKET_SIZE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(ControlError::Malformed);
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
            error => ControlError::Socket(error.into()),
        })?;
        Ok(())
    }

    /// Receives one message and its descriptors, which are close-on-exec. If the socket is non-blocking and there is no
    /// message, it fails with [`ControlError::Socket`] (`WouldBlock`).
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ControlError> {
        match self.receive_packet(MsgFlags::empty()) {
            // If the other end was closed while it had unread messages, the kernel first reports ECONNRESET, once. Read
            // again to receive the messages that the other end sent before.
            Err(ControlError::Socket(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.receive_packet(MsgFlags::empty())
            }
            other => other,
        }
    }

    /// Like [`Self::receive`], but returns `None` at once if there is no message.
    pub(crate) fn try_receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        match self.receive_packet(MsgFlags::MSG_DONTWAIT) {
            Err(ControlError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
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
        .map_err(|error| ControlError::Socket(error.into()))?;
        let mut descriptors = Vec::new();
        for message in received.cmsgs().map_err(|error| ControlError::Socket(error.into()))? {
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
            return Err(ControlError::Malformed);
        }
        let message = postcard::from_bytes(&packet[..length]).map_err(|_| ControlError::Malformed)?;
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
    fn undecodable_packet_is_reported_as_malformed() {
        let (shim, vmm) = Channel::pair().unwrap();
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&shim.as_fd()),
            &[0xff; 9],
            MsgFlags::empty(),
        )
        .unwrap();
        assert!(matches!(vmm.receive::<Command>(), Err(ControlError::Malformed)));
    }
}
