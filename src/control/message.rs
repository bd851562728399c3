//! The messages. File descriptors travel beside a message, in the order that its documentation lists.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::memory::Extent;

/// The bytes before each packet of a tap device (`struct virtio_net_hdr_v1`, virtio 1.3 §5.1.6).
pub(crate) const VNET_HEADER_SIZE: u32 = 12;

/// How much of the guest's console the vmm keeps for error messages, in bytes.
pub(crate) const MAX_CONSOLE_TAIL: usize = 16 << 10;

/// What the shim asks of the vmm. The descriptors named go with the packet, in the order named.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Build the machine and run it; the first command, sent once.
    ///
    /// Descriptors: `/dev/kvm`; the guest's kernel file; the guest's initramfs file; the stream of
    /// [`nutshell_protocol::AGENT_PORT`]; if `file_server`, the connected vhost-user socket of the fs
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
    /// Put a network device into the empty slot `slot` (below [`nutshell_protocol::NETWORK_SLOTS`]);
    /// [`Notice::Plugged`] follows.
    ///
    /// Descriptors: of one tap device, a queue each, at least one. They are non-blocking, with headers of
    /// [`VNET_HEADER_SIZE`] bytes (`TUNSETVNETHDRSZ`) in little-endian order.
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
    pub(crate) file_server: bool,
    /// The disks in the first disk slots.
    pub(crate) disks: Vec<DiskAccess>,
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
pub(crate) enum DiskAccess {
    /// A descriptor follows; the guest may only read it.
    ReadOnly,
    /// A descriptor follows; the guest may read and write it.
    ReadWrite,
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
        /// The slot on the bus ([`nutshell_protocol::slot_device_name`]).
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
    /// The answer to [`Command::ReadConsole`]: the last [`MAX_CONSOLE_TAIL`] bytes of the guest's console.
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
