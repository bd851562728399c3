//! The messages between the shim and the guest's agent, and their framing.
//!
//! All messages share one vsock connection, the agent stream. When the agent is ready, it connects to
//! [`AGENT_PORT`] on the host and sends [`FromAgent::Ready`]. After that the shim sends [`ToAgent`] requests. The
//! agent answers each with one [`FromAgent::Reply`] of the same id, in any order, and sends events as they happen.
//! Each standard stream of a process has a separate connection (see [`Stdio`]).
//!
//! The shim treats every byte from the agent as hostile: frames have at most [`MAX_FROM_AGENT`] bytes and
//! lists have limits, decoding never panics, and no string from the agent is used as a name of anything on the host.

use std::net::{Ipv4Addr, SocketAddrV4};

mod bounds;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod message;
mod names;
mod rootfs;
mod shell;
mod stats;

pub use frame::{FrameBuffer, FrameError, MAX_FROM_AGENT, MAX_TO_AGENT, encode};
pub use message::{
    BlockedThread, ClockReading, ClockSteering, CreateContainer, DELETION_KILL_TIMEOUT, DiskKernel, Event, Exited,
    Failure, FailureKind, FromAgent, GuestSettings, MAX_BLOCKED_THREADS, MAX_CLOCK_RATE, MAX_COMMAND_LINE,
    MAX_DISK_INITRD, MAX_DISK_KERNEL, MAX_KERNEL_SOURCE, MAX_PROCESSES, NetworkParameter, OpenShell, PidNamespace,
    PodFile, ProcessEntry, Ready, Reply, Request, Response, SetUpPod, ShellTerminal, StartExec, Stdio, ToAgent,
};
pub use names::{MAX_NAME_FRAME, MAX_NAME_QUERIES, NameAnswer, NameQuery};
pub use rootfs::{DiskPart, Layer, LayerPath, LayeredRoot, NewDirectory, RootMount, Rootfs};
pub use shell::{MAX_SHELL_DATA, MAX_SHELL_FRAME, ShellInput, ShellOutput, TerminalSize};
pub use stats::{
    ContainerStats, CpuStats, IoStats, MAX_STATISTICS, MemoryEvents, MemoryStats, NetworkStats, PidsStats,
};

/// The host's vsock context id (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// The guest's vsock context id. The vsock devices of two machines are not connected, so all machines use the
/// same id.
pub const GUEST_CID: u32 = 3;

/// The host's vsock port for the agent stream. The agent connects to it when it is ready.
///
/// The agent's own port is at most [`LAST_RESERVED_PORT`], and the host refuses other connections: in the guest of a
/// virtual machine, any process can connect to ports of the host.
pub const AGENT_PORT: u32 = 1;

/// The last vsock port that only processes with `CAP_NET_BIND_SERVICE` can bind (kernel, `net/vmw_vsock/af_vsock.c`,
/// `LAST_RESERVED_PORT`).
pub const LAST_RESERVED_PORT: u32 = 1023;

/// The lowest host port that the shim may assign, at random, to a stream other than the agent stream. Lower ports are
/// reserved.
pub const MIN_STREAM_PORT: u32 = 1024;

/// The address of Docker's resolver for the names of a network, in the network namespace of each container on such a
/// network (`resolverIPSandbox` in Docker's `libnetwork/sandbox_dns_unix.go`).
pub const DOCKER_RESOLVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// The tag of the virtio-fs device that serves the pod's shared directories (virtio 1.3 §5.11.4).
pub const SHARE_TAG: &str = "nutshell";

/// The mount point of the virtio-fs device [`SHARE_TAG`] in the guest.
pub const SHARE_PATH: &str = "/run/nutshell/share";

/// The directory in the share of what several containers may use at the same time. It cannot be the id of a container,
/// which begins with a letter or digit.
pub const COMMON_SHARES: &str = ".shared";

/// The guest directory that contains the bundle of each container, `<id>`, and in it the mount point of its root
/// file system, `<id>/rootfs`.
pub const CONTAINERS_PATH: &str = "/run/nutshell/containers";

/// The mount options that a container's spec may use, in addition to those of each file system (OCI config.md,
/// "Linux mount options"). The shim announces them in its feature list; the agent applies them.
///
/// `shared` and `rshared` are missing because mounts in a guest do not propagate to its host.
pub const MOUNT_OPTIONS: [&str; 48] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

/// Returns the serial of the virtio-blk device in disk slot `slot`, by which the agent finds the disk. It is at most
/// 20 bytes long, as virtio 1.3 §5.2.6 requires.
#[must_use]
pub fn disk_serial(slot: u32) -> String {
    format!("nutshell-{slot}")
}

/// The serial of the disk whose bytes are the agent's program, in a virtual machine with a user's kernel. Its size is
/// rounded up to whole sectors.
pub const AGENT_DISK: &str = "nutshell-agent";

/// The number of slots for network devices in a machine. They are the first bus slots, from 0 on.
pub const NETWORK_SLOTS: u32 = 4;

/// The bus slot of the virtio-mem device, which adds memory to a running machine.
pub const MEMORY_SLOT: u32 = NETWORK_SLOTS;

/// The first bus slot for disks that are added to a running machine: disk slot n is bus slot `FIRST_DISK_SLOT` + n.
pub const FIRST_DISK_SLOT: u32 = MEMORY_SLOT + 1;

/// Returns the name of the virtio-mmio device in bus slot `slot`, on the guest's platform bus.
///
/// The kernel numbers these devices in the order of its command line, where the slots come first. An empty slot
/// reports device id 0, which a driver ignores (virtio 1.3 §4.2.2). After the host has filled a slot, the agent
/// binds the driver to it again.
#[must_use]
pub fn slot_device_name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// Returns the name of the device in bus slot `slot` of a machine with a PCI bus. Device 0 of the bus is the host
/// bridge, and the slots follow.
///
/// While a slot is empty, the device does not exist. After the host has filled a slot, the agent scans the bus again.
#[must_use]
pub fn slot_pci_name(slot: u32) -> String {
    format!("0000:00:{:02x}.0", slot.saturating_add(1))
}
