//! The messages that the shim and the guest's agent exchange, and their framing.
//!
//! One stream carries everything: the agent dials [`AGENT_PORT`] on the host once it is ready and
//! sends [`FromAgent::Ready`]; from then on the shim sends [`ToAgent`] requests and the agent
//! answers each with one [`FromAgent::Reply`] of the same id, in any order, and reports events as
//! they happen. Standard streams of processes are streams of their own (see [`Stdio`]).
//!
//! The shim treats every byte that arrives here as hostile: frames are bounded by [`MAX_FRAME`],
//! decoding never panics, and no string of the agent names anything on the host.

mod frame;
mod message;

pub use frame::{FrameBuffer, FrameError, MAX_FRAME, encode};
pub use message::{
    ContainerStats, CpuStats, CreateContainer, Event, Exited, Failure, FailureKind, FromAgent, IoStats, MemoryEvents,
    MemoryStats, NetworkStats, PidNamespace, PidsStats, PodFile, ProcessEntry, Ready, Reply, Request, Response, Rootfs,
    SetUpPod, StartExec, Stdio, ToAgent,
};

/// The host's vsock context id (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// The guest's vsock context id. Each machine has a transport of its own, so one number serves all.
pub const GUEST_CID: u32 = 3;

/// The host port that the agent dials when it is ready.
pub const AGENT_PORT: u32 = 1;

/// The first host port that the shim gives to a standard stream; lower ones are reserved.
pub const FIRST_STREAM_PORT: u32 = 1024;

/// The tag of the virtio-fs device that carries the pod's shared directories.
pub const SHARE_TAG: &str = "nutshell";

/// Where the agent mounts [`SHARE_TAG`] in the guest.
pub const SHARE_PATH: &str = "/run/nutshell/share";

/// The folder in the guest below which each container has `<id>/rootfs`.
pub const CONTAINERS_PATH: &str = "/run/nutshell/containers";

/// The options of mounts that a container's mounts may have, beside those of the file systems
/// themselves (OCI config.md, "Linux mount options"). The shim announces them, the agent does them.
/// Mounts of a guest do not reach its host, hence no `shared`.
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

/// The serial that the virtio-blk device in disk slot `slot` reports, by which the agent finds it
/// (virtio 1.3 §5.2.6: at most 20 bytes).
#[must_use]
pub fn disk_serial(slot: u32) -> String {
    format!("nutshell-{slot}")
}

/// How many network devices a machine can have.
pub const NETWORK_SLOTS: u32 = 4;

/// The slot behind those for network devices: that of the device by which a machine gets more memory.
pub const MEMORY_SLOT: u32 = NETWORK_SLOTS;

/// The first slot for disks that come while a machine runs: the disk in disk slot n is in slot `FIRST_DISK_SLOT` + n.
pub const FIRST_DISK_SLOT: u32 = MEMORY_SLOT + 1;

/// The name, on the guest's platform bus, of the virtio-mmio device in `slot`. These stand first on the
/// kernel's command line, which numbers them. A slot that is empty answers with the device id 0, which a
/// driver ignores (virtio 1.3 §4.2.2); when it has been filled, the agent has the driver look again.
#[must_use]
pub fn slot_device_name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}
