//! The messages of the control channel. Descriptors are sent with a message, in the documented order.

use std::{fmt, time::Duration};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::lease::Lease;
use crate::memory::Extent;

/// The size of the header before each packet of a tap device (`struct virtio_net_hdr_v1`, virtio 1.3 §5.1.6), in bytes.
pub(crate) const VNET_HEADER_SIZE: u32 = 12;

/// The maximum size of the console tail, which the vmm keeps for error messages, in bytes.
pub(crate) const MAX_CONSOLE_TAIL: usize = 16 << 10;

/// The maximum size of the text of a warning, in bytes.
pub(crate) const MAX_WARNING: usize = 1 << 10;

/// The name of the virtio port on which the QEMU guest agent listens.
pub(crate) const GUEST_AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// A message from the shim to the vmm.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Builds the machine and runs it. The first command, sent once.
    ///
    /// Descriptors: `/dev/kvm`; the file with the guest's kernel; those of [`Software`]; if `file_server`, the
    /// connected vhost-user socket of the fs process; then those of each disk ([`DiskAccess`]).
    Boot(MachineConfig, Software),
    /// Presses the power button of a machine with [`Software::User`]. The guest may ignore it.
    PressPowerButton,
    /// Opens a stream: lets the guest connect to host port `port` once, and copies bytes between that connection and
    /// the descriptors.
    ///
    /// Descriptors: if `input`, one to read from; if `output`, one to write to.
    OpenStream { port: u32, input: bool, output: bool },
    /// Requests [`Notice::Drained`] when `bytes` bytes in total are written to the output of stream `port`, or the
    /// stream is closed.
    Drain { port: u32, bytes: u64 },
    /// Closes stream `port` at once and drops data in flight. [`Notice::StreamClosed`] follows if it was open.
    CloseStream { port: u32 },
    /// Plugs a disk into the empty disk slot `slot`, one of [`MachineConfig::hotplug_disks`]. [`Notice::Plugged`]
    /// follows.
    ///
    /// Descriptors: those of the disk ([`DiskAccess`]).
    PlugDisk { slot: u32, access: DiskAccess },
    /// Unplugs the disk in disk slot `slot`, which the guest must have released. [`Notice::Unplugged`] follows when the
    /// disk's file is closed and the slot is empty.
    UnplugDisk { slot: u32 },
    /// Plugs a network device into the empty slot `slot`, which is less than [`nutshell_protocol::NETWORK_SLOTS`].
    /// [`Notice::Plugged`] follows.
    ///
    /// Descriptors: the queues of one tap device, at least one. They are non-blocking, and their headers have
    /// [`VNET_HEADER_SIZE`] bytes (`TUNSETVNETHDRSZ`) and are little-endian.
    PlugNetworkDevice {
        slot: u32,
        mac: [u8; 6],
        /// The maximum size of a packet without its link header, in bytes.
        mtu: u16,
    },
    /// Resizes the machine, within the limits of [`MachineConfig`]. [`Notice::Resized`] follows. The guest must then
    /// probe [`nutshell_protocol::MEMORY_SLOT`] and bring vCPUs online. [`Notice::MemoryPlugged`] follows when the
    /// guest has the requested memory.
    Resize {
        /// The memory in addition to the boot memory, in bytes, a multiple of 2 MiB.
        memory: u64,
        /// The minimum number of vCPUs: they are never removed.
        vcpus: u8,
    },
    /// Requests [`Notice::Progress`].
    ReadProgress,
    /// Requests [`Notice::Console`].
    ReadConsole,
    /// Requests [`Notice::Statistics`].
    ReadStatistics,
    /// Requests [`Notice::GuestAgentPort`].
    ReadGuestAgentPort,
    /// Requests [`Notice::GuestMemory`].
    ReadGuestMemory,
}

/// The board of a machine: how the guest finds processors and devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum BoardKind {
    /// Virtio over MMIO and an MP table: for the kernel of this project, which it boots fastest.
    #[default]
    Container,
    /// PCI and ACPI, as the kernels of distributions need.
    Pc,
}

/// The hardware of a machine, independent of what boots on it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MachineConfig {
    /// The boot memory in bytes, a multiple of 2 MiB.
    pub(crate) memory: u64,
    /// The maximum memory in bytes, including the boot memory.
    pub(crate) max_memory: u64,
    /// The number of vCPUs at boot.
    pub(crate) vcpus: u8,
    pub(crate) max_vcpus: u8,
    /// Whether there is an fs process (the file server). If so, guest memory is shared with it.
    pub(crate) file_server: bool,
    /// The disks at boot, in the first disk slots.
    pub(crate) disks: Vec<DiskConfig>,
    /// The number of empty disk slots after those, for hot-plugged disks.
    pub(crate) hotplug_disks: u32,
    /// The part of the kernel's file that contains the kernel.
    pub(crate) kernel: Extent,
}

/// What runs on a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Software {
    /// A guest with the agent, on this project's kernel or the configured one.
    ///
    /// Descriptors: the file with the initramfs; the stream of [`nutshell_protocol::AGENT_PORT`].
    Agent {
        board: BoardKind,
        /// The part of the initramfs's file that contains the initramfs.
        initramfs: Extent,
        /// Additional kernel arguments, from the host's configuration and never from a pod.
        kernel_arguments: String,
    },
    /// A kernel of the user's, on [`BoardKind::Pc`].
    ///
    /// Descriptors: the file with the initramfs, if there is one; the input and the output of the serial console, if
    /// there are any, non-blocking; if `guest_agent`, the socket behind [`GUEST_AGENT_PORT`], non-blocking; for each
    /// link, its queues ([`Command::PlugNetworkDevice`]).
    User {
        /// The part of the initramfs's file that contains the initramfs.
        initramfs: Option<Extent>,
        /// The whole command line.
        command_line: String,
        /// Identifies the machine (SMBIOS).
        uuid: [u8; 16],
        /// Strings for the guest's software (SMBIOS, type 11), such as credentials.
        oem_strings: Vec<String>,
        console_input: bool,
        console_output: bool,
        guest_agent: bool,
        links: Vec<LinkConfig>,
    },
}

/// A network device that a machine boots with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkConfig {
    pub(crate) mac: [u8; 6],
    /// The maximum size of a packet without its link header, in bytes.
    pub(crate) mtu: u16,
    /// The number of its queues, at least one.
    pub(crate) queues: u16,
    /// What the guest receives by DHCP. `None` means that the vmm answers no DHCP request of the link.
    pub(crate) lease: Option<Lease>,
}

/// A disk that a machine boots with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskConfig {
    /// Identifies the disk to the guest and in messages: at most 20 bytes (virtio 1.3 §5.2.6, `VIRTIO_BLK_T_GET_ID`).
    pub(crate) serial: String,
    pub(crate) access: DiskAccess,
}

/// The guest's access to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DiskAccess {
    /// Descriptor: a file or block device with the bytes of the disk, open for reading.
    ReadOnly,
    /// Descriptor: a file or block device with the bytes of the disk, open for reading and writing. It is always
    /// raw: a guest that writes the header of another format must not change how the host reads the disk.
    ReadWrite,
    /// Descriptors: a file or block device for each entry, open for reading, and for writing if the guest may write it.
    /// The disk is the first bytes of each, in this order.
    Joined(Vec<FileAccess>),
    /// Descriptor: a raw or qcow2 image that no guest can write, open for reading.
    ReadOnlyImage,
    /// Descriptor: a file of this project, open for reading. The disk is a part of it, padded with zeroes to a whole
    /// sector.
    ReadOnlyPart(Extent),
    /// Descriptors: the base image, open for reading; its copy-on-write file, open for reading and writing, which is
    /// empty or was used with the same image before. No other vmm may have it.
    CopyOnWrite {
        format: BaseFormat,
        /// The boot ID of the host (`/proc/sys/kernel/random/boot_id`). If it differs from the one in the file, the
        /// host may have crashed, and the disk has the state of the last flush.
        host_boot: [u8; 16],
        /// The guest can only read: it sees the disk with the writes of earlier guests.
        read_only: bool,
    },
}

/// The guest's access to a file of a [`DiskAccess::Joined`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileAccess {
    /// How many bytes of the file belong to the disk: a multiple of 512, and not 0.
    pub(crate) length: u64,
    pub(crate) read_only: bool,
}

/// How the vmm finds out the format of a base image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum BaseFormat {
    /// Raw or qcow2, as the header of the image says. No guest can write the image.
    Detected,
    /// Raw. The format is not detected, because an earlier guest may have written the image.
    Raw,
}

/// A message from the vmm to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// Stream `port` has delivered the bytes of [`Command::Drain`], or is closed.
    Drained { port: u32 },
    /// Stream `port` and its descriptors are closed, in both directions. All data that the guest had sent is written,
    /// unless the reader has closed its end.
    StreamClosed { port: u32 },
    /// The reply to [`Command::PlugNetworkDevice`] and [`Command::PlugDisk`]. On success, the guest may probe the slot.
    Plugged {
        /// The slot on the bus ([`nutshell_protocol::slot_device_name`]).
        slot: u32,
        result: Result<(), String>,
    },
    /// A machine with [`Software::User`] is built, and its vCPUs run. [`Notice::Ended`] follows instead if it cannot be
    /// built.
    Built,
    /// The reply to [`Command::UnplugDisk`].
    Unplugged {
        /// The slot on the bus.
        slot: u32,
    },
    /// The reply to [`Command::Resize`]. On success, memory and vCPUs are available to the guest.
    Resized { result: Result<(), String> },
    /// The guest has the memory that [`Command::Resize`] requested.
    MemoryPlugged {
        /// The memory in addition to the boot memory, in bytes.
        bytes: u64,
    },
    /// The reply to [`Command::ReadProgress`].
    Progress {
        /// How many different I/O addresses the guest has used since its start. It grows while a guest boots.
        count: u64,
    },
    /// The reply to [`Command::ReadConsole`]: the last [`MAX_CONSOLE_TAIL`] bytes of the guest's console.
    Console(Vec<u8>),
    /// The reply to [`Command::ReadStatistics`].
    Statistics(MachineStatistics),
    /// The reply to [`Command::ReadGuestAgentPort`].
    GuestAgentPort {
        /// Whether a program in the guest has [`GUEST_AGENT_PORT`] open. `false` if there is no such port.
        open: bool,
    },
    /// The reply to [`Command::ReadGuestMemory`]. It waits for the guest's driver, and so may never come.
    GuestMemory(MemoryState),
    /// A failure in the vmm that the guest cannot see, or of which it sees only the effect.
    Warning {
        /// The device: the serial of a disk, or the name that the log has for a device of another kind.
        device: String,
        /// In one line, at most [`MAX_WARNING`] bytes.
        text: String,
    },
    /// The machine could not be built or has ended. The final notice: the vmm exits after it.
    Ended {
        reason: EndReason,
        /// The last [`MAX_CONSOLE_TAIL`] bytes of the guest's console.
        console: Vec<u8>,
    },
}

/// What the guest does with its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemoryState {
    /// Whether the guest has a driver for memory in addition to its boot memory.
    pub(crate) has_driver: bool,
    /// How much of that memory the driver has added, in bytes.
    pub(crate) plugged: u64,
    /// The total memory of the guest's kernel, in bytes, without memory that it leaves offline. `None` if the guest
    /// does not report it.
    pub(crate) total: Option<u64>,
}

/// What the devices of a machine have done, and when it passed the phases of its boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineStatistics {
    pub(crate) devices: Vec<DeviceCounters>,
    /// When the machine was built, just before its vCPUs start, on the clock of [`monotonic_now`].
    pub(crate) built_at: Option<Duration>,
    /// When the guest's kernel did its first I/O, on the same clock.
    pub(crate) first_io_at: Option<Duration>,
}

/// What a device has done since it was created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceCounters {
    /// The serial of a disk, or the name that the log has for a device of another kind.
    pub(crate) name: String,
    /// Requests, packets or messages.
    pub(crate) requests: u64,
    /// Requests that failed, data that was lost, and queues that are no longer served.
    pub(crate) errors: u64,
    /// Bytes that the guest received.
    pub(crate) bytes_to_guest: u64,
    /// Bytes that the guest sent.
    pub(crate) bytes_from_guest: u64,
    /// The number of times that a queue or stream made no progress for 10 s.
    pub(crate) stalls: u64,
}

/// The time since the host's start, which is the same for shim and vmm (`CLOCK_MONOTONIC`).
pub(crate) fn monotonic_now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Why a machine has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EndReason {
    /// The machine could not be built. The text has the cause and, if there is one, the remedy.
    BuildFailed(String),
    /// The guest reset itself, after a kernel panic, a triple fault, or a fatal error of the agent. A user's kernel
    /// does so to reboot.
    GuestReset,
    /// The guest switched the machine off.
    GuestPowerOff,
    /// KVM could not continue to run the guest.
    KvmFailed(String),
    /// A device or its thread failed.
    DeviceFailed(String),
}

impl fmt::Display for EndReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildFailed(reason) | Self::DeviceFailed(reason) | Self::KvmFailed(reason) => {
                formatter.write_str(reason)
            }
            Self::GuestReset => formatter.write_str("the guest reset itself"),
            Self::GuestPowerOff => formatter.write_str("the guest switched itself off"),
        }
    }
}
