//! The control channel between shim and vmm: one `SOCK_SEQPACKET` socketpair, one message a packet,
//! descriptors beside it (`SCM_RIGHTS`). The vmm finds its end on descriptor 0.
//!
//! Both ends are the same executable, so there is no version in the messages. The shim treats what
//! the vmm sends as hostile all the same: it is the process that a guest attacks first. The vmm
//! gets every host resource from here and opens none itself.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The largest packet, in bytes; a console's tail is the largest part.
const MAX_PACKET: usize = 64 << 10;

/// The most descriptors in one packet (the kernel's limit is 253).
const MAX_DESCRIPTORS: usize = 64;

/// The bytes before each packet of a tap device (`struct virtio_net_hdr_v1`, virtio 1.3 §5.1.6).
pub(crate) const NET_HEADER: u32 = 12;

/// How much of the guest's console the vmm keeps for error messages, in bytes.
pub(crate) const CONSOLE_TAIL: usize = 16 << 10;

/// What goes wrong on the channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// The other process is gone.
    #[error("the other end of the control channel is gone")]
    Closed,
    /// The packet is no message of this executable.
    #[error("a malformed packet came over the control channel")]
    Malformed,
    /// The socket failed.
    #[error("control channel: {0}")]
    Socket(#[source] io::Error),
}

/// What the shim asks of the vmm. The descriptors named go with the packet, in the order named.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Build the machine and run it; the first command, sent once.
    ///
    /// Descriptors: `/dev/kvm`; the guest's kernel file; the guest's initramfs file; the stream of
    /// [`nutshell_protocol::AGENT_PORT`]; if `share`, the connected vhost-user socket of the fs
    /// process; then each disk's file or block device.
    Boot(MachineConfig),
    /// Let the guest connect to host port `port`, once, and carry bytes between that connection
    /// and the descriptors: if `input`, one that is read from; if `output`, one that is written to.
    OpenStream {
        /// The host port.
        port: u32,
        /// A descriptor to read follows.
        input: bool,
        /// A descriptor to write follows.
        output: bool,
    },
    /// Say [`Notice::Drained`] once `bytes` in all were written to the output of stream `port`, or
    /// the stream is closed.
    Drain {
        /// The host port.
        port: u32,
        /// The count since the stream was opened.
        bytes: u64,
    },
    /// Close a stream at once, whatever is in flight; [`Notice::StreamClosed`] follows if it was open.
    CloseStream {
        /// The host port.
        port: u32,
    },
    /// Put a disk into disk slot `slot`, one of those that the machine keeps free; [`Notice::Plugged`] follows.
    /// Descriptor: the file or block device.
    PlugDisk {
        /// The disk slot.
        slot: u32,
        /// The guest may only read.
        read_only: bool,
    },
    /// Take the disk out of disk slot `slot`, which the guest has let go; [`Notice::Unplugged`] follows when its
    /// file is closed, and then the slot is free again.
    UnplugDisk {
        /// The disk slot.
        slot: u32,
    },
    /// Put a network device into the empty slot `slot` (below [`nutshell_protocol::LINK_SLOTS`]);
    /// [`Notice::Plugged`] follows.
    ///
    /// Descriptors: of one tap device, a queue each, at least one. They are non-blocking, with headers of
    /// [`NET_HEADER`] bytes (`TUNSETVNETHDRSZ`) in little-endian order.
    PlugLink {
        /// The slot.
        slot: u32,
        /// The hardware address.
        mac: [u8; 6],
        /// The largest packet without its link header, in bytes.
        mtu: u16,
    },
    /// Change the machine's size, within what it was built for; [`Notice::Resized`] follows. The guest is
    /// to look at [`nutshell_protocol::MEMORY_SLOT`] and at its processors then, and [`Notice::MemoryPlugged`]
    /// follows.
    Resize {
        /// Bytes of memory beyond what it booted with, whole blocks of 2 MiB.
        memory: u64,
        /// The processors that there should be at least.
        vcpus: u8,
    },
    /// Send [`Notice::Console`].
    ReadConsole,
}

/// The machine to build.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MachineConfig {
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub(crate) memory: u64,
    /// How much memory it may come to have, in bytes.
    pub(crate) max_memory: u64,
    /// How many vCPUs.
    pub(crate) vcpus: u8,
    /// How many it may come to have.
    pub(crate) max_vcpus: u8,
    /// There is an fs process: guest memory is shared with it.
    pub(crate) share: bool,
    /// The disks in the first disk slots.
    pub(crate) disks: Vec<Disk>,
    /// How many disk slots follow, for disks that come later.
    pub(crate) hotplug_disks: u32,
    /// The kernel within its file.
    pub(crate) kernel: Extent,
    /// The initramfs within its file.
    pub(crate) initramfs: Extent,
    /// Words added to the kernel's command line (configuration of the host's owner, never a pod's).
    pub(crate) kernel_arguments: String,
}

/// A disk at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Disk {
    /// A descriptor follows; the guest may only read it.
    ReadOnly,
    /// A descriptor follows; the guest may read and write it.
    ReadWrite,
}

/// A part of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extent {
    /// Where it starts; page-aligned for the kernel, so that it can be mapped.
    pub(crate) offset: u64,
    /// How long it is.
    pub(crate) length: u64,
}

/// What the vmm tells the shim.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// Stream `port` delivered what [`Command::Drain`] asked for, or is closed.
    Drained {
        /// The host port.
        port: u32,
    },
    /// Stream `port` has ended in both directions, and its descriptors are closed. All that the
    /// guest sent before was written, unless the reader is gone.
    StreamClosed {
        /// The host port.
        port: u32,
    },
    /// The answer to [`Command::PlugLink`] and [`Command::PlugDisk`]: the guest may look for the device.
    Plugged {
        /// The slot on the bus ([`nutshell_protocol::slot_device`]).
        slot: u32,
        /// Why there is none.
        result: Result<(), String>,
    },
    /// The answer to [`Command::UnplugDisk`].
    Unplugged {
        /// The slot on the bus.
        slot: u32,
    },
    /// The answer to [`Command::Resize`]: memory and processors are there for the guest to take.
    Resized {
        /// Why not.
        result: Result<(), String>,
    },
    /// The guest has taken or given memory until it had what [`Command::Resize`] said.
    MemoryPlugged {
        /// Bytes beyond what it booted with.
        bytes: u64,
    },
    /// The answer to [`Command::ReadConsole`]: the last [`CONSOLE_TAIL`] bytes of the guest's console.
    Console(Vec<u8>),
    /// The machine could not be built or has stopped; the last notice, the vmm exits after it.
    Ended {
        /// Why.
        reason: EndReason,
        /// The tail of the guest's console.
        console: Vec<u8>,
    },
}

/// Why a machine is no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EndReason {
    /// The machine could not be built: what failed and what to do.
    BuildFailed(String),
    /// The guest reset itself: a panic, a triple fault, or the agent giving up.
    GuestReset,
    /// KVM could not go on: what it said.
    KvmFailed(String),
    /// A device worker of the vmm failed.
    DeviceFailed(String),
}

impl fmt::Display for EndReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildFailed(why) | Self::DeviceFailed(why) | Self::KvmFailed(why) => formatter.write_str(why),
            Self::GuestReset => formatter.write_str("the guest reset itself"),
        }
    }
}

/// One end of the channel. Close-on-exec.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Both ends of a new channel.
    pub(crate) fn pair() -> Result<(Self, Self), ControlError> {
        let (left, right) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|error| ControlError::Socket(error.into()))?;
        Ok((Self { socket: left }, Self { socket: right }))
    }

    /// The same end once more, for another thread to send by.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        Ok(Self { socket })
    }

    /// Sends `message` with `descriptors`. Blocks while the socket's buffer is full unless the
    /// descriptor is non-blocking.
    pub(crate) fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        let packet = postcard::to_stdvec(message).map_err(|_| ControlError::Malformed)?;
        if packet.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
            return Err(ControlError::Malformed);
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[io::IoSlice::new(&packet)],
            if raw.is_empty() { &[] } else { &rights },
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|error| match error {
            Errno::EPIPE | Errno::ECONNRESET => ControlError::Closed,
            error => ControlError::Socket(error.into()),
        })?;
        Ok(())
    }

    /// Receives one message and its descriptors, all close-on-exec. Blocks unless the descriptor
    /// is non-blocking ([`ControlError::Socket`] with `WouldBlock` then).
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ControlError> {
        match self.receive_packet(MsgFlags::empty()) {
            // The kernel says once that the other end closed before it had read all that was sent to
            // it, and says it before it hands out what that end had sent: its last word.
            Err(ControlError::Socket(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.receive_packet(MsgFlags::empty())
            }
            other => other,
        }
    }

    /// As [`Self::receive`], but `None` at once if there is no message.
    pub(crate) fn try_receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        match self.receive_packet(MsgFlags::MSG_DONTWAIT) {
            Err(ControlError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            other => other.map(Some),
        }
    }

    fn receive_packet<T: DeserializeOwned>(&self, flags: MsgFlags) -> Result<(T, Vec<OwnedFd>), ControlError> {
        let mut packet = vec![0; MAX_PACKET];
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
                // SAFETY: the kernel has just installed these descriptors for this process, and
                // nothing else knows their numbers yet.
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
    fn last_word_arrives_though_its_sender_left_commands_unread() {
        let (shim, vmm) = Channel::pair().unwrap();
        shim.send(&Command::ReadConsole, &[]).unwrap();
        vmm.send(&Notice::Drained { port: 7 }, &[]).unwrap();
        drop(vmm);

        let last = shim.receive::<Notice>();

        assert!(matches!(last, Ok((Notice::Drained { port: 7 }, _))), "{last:?}");
        assert!(matches!(shim.receive::<Notice>(), Err(ControlError::Closed)));
    }

    #[test]
    fn garbage_is_malformed_and_not_a_panic() {
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
