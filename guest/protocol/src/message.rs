//! What is said. Ids of containers and execs are containerd's own and are checked by the shim to
//! be single path components before they are sent.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What the shim sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the shim, returned in the [`Reply`].
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// What the agent is asked to do. Each has its own [`Response`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Make ready what the containers of a pod share, once, before the first of them: [`Response::Done`].
    /// A machine for one container is not asked.
    SetUpPod(SetUpPod),
    /// Create a container up to, not including, its first instruction: [`Response::Created`].
    CreateContainer(CreateContainer),
    /// Run a created container's process: [`Response::Done`].
    StartContainer {
        /// The container.
        container: String,
    },
    /// Run a further process in a running container: [`Response::Created`].
    StartExec(StartExec),
    /// Send a signal: [`Response::Done`]. NotFound if the process has ended.
    Signal {
        /// The container.
        container: String,
        /// The exec, or `None` for the container's first process.
        exec: Option<String>,
        /// A Linux signal number, real-time ones included.
        signal: u32,
        /// Every process of the container, not just the one named.
        all: bool,
    },
    /// Set a terminal's size: [`Response::Done`], also where there is no terminal.
    Resize {
        /// The container.
        container: String,
        /// The exec, or `None` for the container's first process.
        exec: Option<String>,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// The container's processes: [`Response::Processes`].
    Processes {
        /// The container.
        container: String,
    },
    /// The container's resource use: [`Response::Stats`].
    Stats {
        /// The container.
        container: String,
    },
    /// Change the container's limits: [`Response::Done`].
    Update {
        /// The container.
        container: String,
        /// OCI `LinuxResources` as JSON.
        resources: Vec<u8>,
    },
    /// Freeze the container's processes: [`Response::Done`].
    Pause {
        /// The container.
        container: String,
    },
    /// Thaw the container's processes: [`Response::Done`].
    Resume {
        /// The container.
        container: String,
    },
    /// Kill what is left of the container, unmount its rootfs, forget it: [`Response::Done`].
    DeleteContainer {
        /// The container.
        container: String,
    },
    /// Set the guest's clock, at the start and where the host's has jumped: [`Response::Done`].
    SetClock {
        /// The host's clock as this was sent: nanoseconds since the epoch.
        nanoseconds: u64,
    },
    /// Find the network device in each of these slots (see [`crate::slot_device_name`]), which the host has
    /// filled: [`Response::InterfaceIndexes`].
    ProbeNetworkDevices {
        /// The slots.
        slots: Vec<u32>,
    },
    /// Let go of the disk in this disk slot, which nothing uses any more: [`Response::Done`] once the host may
    /// take it away.
    ReleaseDisk {
        /// The slot.
        slot: u32,
    },
    /// Take the size that the machine has now: [`Response::Done`] once the processors are in use or out of
    /// use; memory comes and goes by itself then.
    ResizeMachine {
        /// How many processors are to be in use.
        vcpus: u32,
        /// There is a device in [`crate::MEMORY_SLOT`].
        has_memory_device: bool,
    },
    /// Pass these messages of rtnetlink(7) to the kernel, each a whole request, until one fails:
    /// [`Response::Done`].
    ConfigureNetwork {
        /// What each is for, in words for an error, and the message with its header.
        messages: Vec<(String, Vec<u8>)>,
    },
    /// Connect to a port of the machine's loopback interface and carry bytes between that connection and
    /// the stream: [`Response::Done`] once both are there.
    ForwardConnection {
        /// The host port of the stream.
        stream_port: u32,
        /// Where something of the pod may listen: the first that answers.
        targets: Vec<SocketAddr>,
    },
    /// Write all file systems back; the machine is ended after the [`Response::Done`].
    Shutdown,
}

/// What the containers of a pod share, beside the machine's own namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetUpPod {
    /// The host name.
    pub hostname: Option<String>,
    /// The NIS domain name.
    pub domainname: Option<String>,
    /// Kernel parameters and their values, the names in sysctl(8)'s form.
    pub sysctls: Vec<(String, String)>,
    /// The size of the one `/dev/shm`, in bytes.
    pub shm_size: u64,
    /// Files that a container has where its spec mounts nothing.
    pub files: Vec<PodFile>,
}

/// A file that is the same in all containers of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFile {
    /// Where containers have it: an absolute path.
    pub destination: String,
    /// What is in it at first.
    pub content: Vec<u8>,
}

/// The pid namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// As the spec has it.
    Specified,
    /// The one that containers of the pod share.
    Pod,
    /// That of the first process of another container.
    Container(String),
}

/// A container to create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateContainer {
    /// containerd's id of the container.
    pub container: String,
    /// The OCI runtime spec as JSON, already translated for the guest: `root.path` is
    /// `<CONTAINERS_PATH>/<id>/rootfs`, sources of bind mounts are guest paths.
    pub spec: Vec<u8>,
    /// What to mount at `root.path`.
    pub rootfs: Rootfs,
    /// Its pid namespace.
    pub pid_namespace: PidNamespace,
    /// The standard streams of the first process.
    pub stdio: Stdio,
}

/// Where a container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rootfs {
    /// A directory below [`crate::SHARE_PATH`], bound to `root.path`.
    Share {
        /// Relative to the share, without `..`.
        path: String,
    },
    /// A file system on the virtio-blk device in a slot (see [`crate::disk_serial`]).
    Disk {
        /// The slot.
        slot: u32,
        /// The file system's type, as `mount(2)` takes it.
        filesystem: String,
        /// Mount options as fstab has them (`ro`, `noatime`, `discard` …).
        options: Vec<String>,
    },
}

/// The standard streams of a process: host ports that the agent dials, one stream each.
///
/// The stream of standard input only carries bytes to the guest, the others only from it. The side
/// that has no more to say shuts its direction down; the agent closes a stream after it saw, or
/// sent, that end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Standard input; `/dev/null` if `None`.
    pub stdin: Option<u32>,
    /// Standard output, or all of a terminal's output; `/dev/null` if `None`.
    pub stdout: Option<u32>,
    /// Standard error; `None` with a terminal.
    pub stderr: Option<u32>,
    /// The process gets a pseudo-terminal of the guest as controlling terminal.
    pub terminal: bool,
    /// The terminal's first size: columns, rows.
    pub size: Option<(u16, u16)>,
}

/// A process to run in a running container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartExec {
    /// The container.
    pub container: String,
    /// containerd's id of the exec, unique in its container.
    pub exec: String,
    /// OCI `Process` as JSON.
    pub process: Vec<u8>,
    /// Its standard streams.
    pub stdio: Stdio,
}

/// What the agent sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The first message: the agent takes requests.
    Ready(Ready),
    /// The answer to a request.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// The agent's greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The agent's version.
    pub version: String,
    /// The guest's kernel release, as `uname -r` prints it.
    pub kernel: String,
}

/// The answer to the request with the same id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub result: Result<Response, Failure>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// It is done.
    Done,
    /// The process exists; its pid in the guest.
    Created {
        /// In the guest's first pid namespace.
        pid: u32,
    },
    /// The processes of a container.
    Processes(Vec<ProcessEntry>),
    /// The kernel's index of the network interface in each slot that was asked for.
    InterfaceIndexes(Vec<u32>),
    /// The resource use of a container.
    Stats(Box<ContainerStats>),
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// In the guest's first pid namespace.
    pub pid: u32,
    /// Set if it was started as an exec.
    pub exec: Option<String>,
}

/// Why a request failed; becomes a gRPC code and the user's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind.
    pub kind: FailureKind,
    /// What failed, on what, in runc's words where users search for those.
    pub message: String,
}

/// The kinds of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// A container or exec of that id exists.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// Anything else.
    Internal,
    /// The spec asks for what cannot be.
    InvalidArgument,
    /// No such container, exec or process.
    NotFound,
    /// The guest does not offer it.
    Unimplemented,
}

/// Something happened without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A process ended. Sent once per process, after every exec's of its container for a first
    /// process, and after the [`Response::Created`] of the process.
    Exited(Exited),
    /// The kernel killed a process of the container for want of memory. Sent before the
    /// [`Event::Exited`] that it explains.
    OutOfMemory {
        /// The container.
        container: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// The container.
    pub container: String,
    /// The exec, or `None` for the container's first process.
    pub exec: Option<String>,
    /// 0–255; 128 + n for a process killed by signal n.
    pub status: u8,
    /// Nanoseconds since the epoch, guest clock.
    pub exited_at: u64,
    /// How many bytes the process and its children had written to standard output when it ended:
    /// the exit is reported to containerd once the host delivered that many.
    pub stdout_bytes: u64,
    /// The same for standard error.
    pub stderr_bytes: u64,
}

/// Resource use of a container, from its cgroup (v2). Fields are named as in the cgroup's files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// `cpu.stat`.
    pub cpu: CpuStats,
    /// `io.stat`, by device.
    pub io: Vec<IoStats>,
    /// `memory.*`.
    pub memory: MemoryStats,
    /// `memory.events`.
    pub memory_events: MemoryEvents,
    /// The network interfaces that the container sees, without `lo`.
    pub network: Vec<NetworkStats>,
    /// `pids.*`.
    pub pids: PidsStats,
}

/// `cpu.stat`; times in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in cpu.stat")]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
}

/// `io.stat` of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in io.stat")]
pub struct IoStats {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
}

/// `memory.stat`, `memory.current`, `memory.max` and the swap pair; bytes but for the fault counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// `memory.current`.
    pub usage: u64,
    /// `memory.max`; `u64::MAX` for `max`.
    pub usage_limit: u64,
    /// `memory.swap.current`.
    pub swap_usage: u64,
    /// `memory.swap.max`; `u64::MAX` for `max`.
    pub swap_limit: u64,
    /// Every line of `memory.stat`, in its order.
    pub stat: Vec<(String, u64)>,
}

/// `memory.events`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in memory.events")]
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    pub oom_kill: u64,
    pub oom_group_kill: u64,
}

/// Counters of one network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in /proc/net/dev")]
pub struct NetworkStats {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// `pids.current` and `pids.max` (`u64::MAX` for `max`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in the cgroup's files")]
pub struct PidsStats {
    pub current: u64,
    pub limit: u64,
}
