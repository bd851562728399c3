//! The messages. Ids of containers and execs are containerd's; the shim ensures that each is a single path
//! component before it sends them.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ContainerStats, NETWORK_SLOTS, Rootfs, TerminalSize, bounds};

/// A message from the shim to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the shim; the [`Reply`] repeats it.
    pub id: u64,
    /// The operation to perform.
    pub request: Request,
}

/// An operation that the agent performs. Each variant's documentation names the [`Response`] on success.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Prepare the resources that a pod's containers share: [`Response::Done`]. Sent once, before the pod's first
    /// container is created. Not sent to a machine that runs a single container.
    SetUpPod(SetUpPod),
    /// Create a container, whose program does not run yet: [`Response::Created`].
    CreateContainer(CreateContainer),
    /// Run the `startContainer` hooks and the program of a created container: [`Response::Done`].
    StartContainer {
        /// The id of the container.
        container: String,
    },
    /// Run an additional process in a container: [`Response::Created`].
    StartExec(StartExec),
    /// Send a signal: [`Response::Done`]. Fails with [`FailureKind::NotFound`] if the process has ended.
    Signal {
        /// The id of the container.
        container: String,
        /// The id of the exec, or `None` for the container's first process.
        exec: Option<String>,
        /// A Linux signal number, real-time ones included.
        signal: u32,
        /// Signal every process of the container, not only the one that `exec` names.
        all: bool,
    },
    /// Set the size of a process's terminal: [`Response::Done`]. No effect on a process without a terminal.
    Resize {
        /// The id of the container.
        container: String,
        /// The id of the exec, or `None` for the container's first process.
        exec: Option<String>,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// List the container's processes: [`Response::Processes`].
    Processes {
        /// The id of the container.
        container: String,
    },
    /// Read the container's resource usage: [`Response::Stats`].
    Stats {
        /// The id of the container.
        container: String,
    },
    /// Change the container's resource limits: [`Response::Done`].
    Update {
        /// The id of the container.
        container: String,
        /// OCI `LinuxResources` as JSON. Limits that are not in it do not change.
        resources: Vec<u8>,
    },
    /// Freeze the container's processes: [`Response::Done`].
    Pause {
        /// The id of the container.
        container: String,
    },
    /// Thaw the container's processes: [`Response::Done`].
    Resume {
        /// The id of the container.
        container: String,
    },
    /// List the threads that are blocked in the kernel and keep a process that was sent SIGKILL from ending:
    /// [`Response::BlockedThreads`]. The list is empty if a thread still runs, such as one that frees memory. The first
    /// process of a container may also wait for the other processes in its pid namespace, so theirs count too.
    BlockedThreads {
        /// The id of the container.
        container: String,
        /// The id of the exec, or `None` for the container's first process.
        exec: Option<String>,
    },
    /// Like [`Self::DeleteContainer`], for a container with processes that do not end: [`Response::Done`]. They stay
    /// until they can end or the machine ends, their cgroup until the machine ends. No [`Event::Exited`] follows.
    AbandonContainer {
        /// The id of the container.
        container: String,
    },
    /// Kill the container's remaining processes, unmount its root file system and remove all of its state:
    /// [`Response::Done`]. Fails if a process has not ended after [`DELETION_KILL_TIMEOUT`].
    DeleteContainer {
        /// The id of the container.
        container: String,
    },
    /// Apply settings of the node: [`Response::Done`]. Sent once, as the first request.
    ConfigureGuest(GuestSettings),
    /// Set the guest's clock, and end a temporary rate: [`Response::Clock`]. Sent at boot, when the host's clock has
    /// jumped, and when the guest's clock is far off.
    SetClock {
        /// The host's clock at the time of sending, in nanoseconds since the epoch. Used if the guest cannot read the
        /// host's clock.
        nanoseconds: u64,
        /// The rate from now on, as in [`ClockSteering::rate`].
        rate: i32,
    },
    /// Change the rate of the guest's clock: [`Response::Clock`], read after the change.
    SteerClock(ClockSteering),
    /// Read the guest's clock: [`Response::Clock`].
    ReadClock,
    /// Bind the drivers of network devices that the host has added: [`Response::InterfaceIndexes`].
    ProbeNetworkDevices {
        /// The bus slots of the devices (see [`crate::slot_device_name`]).
        slots: Vec<u32>,
    },
    /// Unbind the driver of an unused disk: [`Response::Done`]. After that the host may remove the disk.
    ReleaseDisk {
        /// Counted from 0, as for [`crate::disk_serial`].
        slot: u32,
    },
    /// Find what the boot loader of an unused disk would boot, and send the kernel and the initrd to the host:
    /// [`Response::DiskKernel`] after all of their bytes, when the disk is unused again. Give it a disk that the guest
    /// can only read: on another disk, the guest's kernel would replay the journals of file systems.
    FindDiskKernel {
        /// Counted from 0, as for [`crate::disk_serial`].
        slot: u32,
        /// The host's vsock port to which the agent connects the stream of the kernel.
        kernel_stream_port: u32,
        /// The host's vsock port to which the agent connects the stream of the initrd.
        initrd_stream_port: u32,
    },
    /// Adapt the guest to the machine's new size: [`Response::Done`] once the vCPUs are online or offline. Memory
    /// is plugged and unplugged by the virtio-mem driver afterwards.
    ResizeMachine {
        /// The number of vCPUs to set online.
        vcpus: u32,
        /// Whether there is a virtio-mem device in [`crate::MEMORY_SLOT`].
        has_memory_device: bool,
    },
    /// Send rtnetlink(7) requests to the kernel, in order, until one fails: [`Response::Done`]. A request for an
    /// object that exists (`EEXIST`) counts as success.
    ConfigureNetwork {
        /// Requests that name links and bring them up: for each its purpose, for an error text, and the netlink message
        /// including its header.
        links: Vec<(String, Vec<u8>)>,
        /// Parameters to set before the requests of `messages`.
        parameters: Vec<NetworkParameter>,
        /// Requests for everything else, as in `links`.
        messages: Vec<(String, Vec<u8>)>,
    },
    /// Connect to a TCP port of the pod and relay bytes between that connection and a stream to the host:
    /// [`Response::Done`] once both are connected.
    ForwardConnection {
        /// The host's vsock port, to which the agent connects the stream.
        stream_port: u32,
        /// Addresses on the guest's loopback interface. The agent connects to the first that accepts.
        targets: Vec<SocketAddr>,
    },
    /// Start a shell in the guest, beside the containers, for the host's administrator: [`Response::Done`] once it
    /// runs.
    OpenShell(OpenShell),
    /// Relay DNS queries for [`crate::DOCKER_RESOLVER`] to the host: [`Response::Done`] once queries are received. The
    /// stream carries [`crate::NameQuery`] to the host and [`crate::NameAnswer`] to the guest. Sent at most once.
    RelayNames {
        /// The host's vsock port, to which the agent connects the stream.
        stream_port: u32,
    },
    /// Remove all containers and write back all file systems: [`Response::Done`]. The shim then ends the machine.
    Shutdown,
}

/// A shell in the guest, outside of all containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenShell {
    /// The host's vsock port, to which the agent connects the stream of [`crate::ShellInput`] and
    /// [`crate::ShellOutput`].
    pub stream_port: u32,
    /// A statically linked BusyBox.
    pub program: Vec<u8>,
    /// `None` for a shell that reads commands from a pipe.
    pub terminal: Option<ShellTerminal>,
}

/// Settings of the terminal that the agent opens for a shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellTerminal {
    /// The initial size.
    pub size: TerminalSize,
    /// The kind of the client's terminal, for the variable `TERM`.
    pub kind: String,
}

/// Settings that the containers of a pod share. The agent applies them to the machine's own namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetUpPod {
    /// The host name.
    pub hostname: Option<String>,
    /// The NIS domain name.
    pub domainname: Option<String>,
    /// Kernel parameters: the name, in the form of sysctl(8), and the value.
    pub sysctls: Vec<(String, String)>,
    /// The size of the pod's `/dev/shm`, in bytes.
    pub shm_size: u64,
    /// Files that the agent bind-mounts into each container, unless its spec mounts something at the same path.
    pub files: Vec<PodFile>,
}

/// A file that all containers of a pod share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFile {
    /// Its absolute path in the containers.
    pub destination: String,
    /// Its initial content.
    pub content: Vec<u8>,
}

/// A kernel parameter of a network namespace. The agent sets it only if it has the expected value: otherwise the spec
/// of a container or of the pod has set it. Parameters that the guest's kernel does not have are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkParameter {
    /// The path below `/proc/sys`.
    pub name: String,
    /// The value before any parameter of the request is set.
    pub expected: String,
    /// What the agent writes if the parameter has the value `expected`.
    pub value: String,
}

/// Selects the pid namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// As in the OCI spec.
    Specified,
    /// The pod's shared pid namespace.
    Pod,
    /// The pid namespace of the container with this id.
    Container(String),
}

/// The arguments of [`Request::CreateContainer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateContainer {
    /// containerd's id of the container.
    pub container: String,
    /// The OCI runtime spec as JSON, already translated for the guest: `root.path` is
    /// `<CONTAINERS_PATH>/<id>/rootfs`, and the sources of bind mounts are guest paths.
    pub spec: Vec<u8>,
    /// The file system to mount at `root.path`.
    pub rootfs: Rootfs,
    /// Replaces the spec's, unless it is [`PidNamespace::Specified`].
    pub pid_namespace: PidNamespace,
    /// The standard streams of the container's first process.
    pub stdio: Stdio,
}

/// The standard streams of a process. Each uses a separate connection, from the agent to a vsock port of the host.
///
/// Standard input carries bytes only to the guest, the other streams only to the host. The sender shuts down its
/// direction at the end of its data. The agent closes a stream after it has received or sent that shutdown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// The host port of standard input; `None` means `/dev/null`.
    pub stdin: Option<u32>,
    /// The host port of standard output, or of the terminal's output; `None` means `/dev/null`.
    pub stdout: Option<u32>,
    /// The host port of standard error; `None` means `/dev/null`. Always `None` with a terminal.
    pub stderr: Option<u32>,
    /// Whether the process has a pseudo-terminal as its controlling terminal.
    pub terminal: bool,
    /// The terminal's initial size: columns, rows.
    pub size: Option<(u16, u16)>,
}

/// A process to run in an existing container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartExec {
    /// The id of the container.
    pub container: String,
    /// containerd's id of the exec, unique within its container.
    pub exec: String,
    /// OCI `Process` as JSON.
    pub process: Vec<u8>,
    /// The standard streams of the process.
    pub stdio: Stdio,
}

/// The rate of the guest's clock. Replaces all earlier rates. Rates are in billionths: the clock gains `rate`
/// nanoseconds on its clock source in each second. The agent limits the sum of both rates to [`MAX_CLOCK_RATE`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockSteering {
    /// The permanent rate.
    pub rate: i32,
    /// What is added to `rate` at first, to remove an error of the clock. The agent ends it without another request, so
    /// that a shim that stops cannot leave it in place.
    pub temporary_rate: i32,
    /// How long `temporary_rate` is added, in milliseconds by the guest's clock.
    pub temporary_milliseconds: u32,
}

/// The largest and, negated, the smallest rate of the guest's clock, in billionths: Linux allows a tick that is 10 %
/// longer or shorter (adjtimex(2), `tick`).
pub const MAX_CLOCK_RATE: i32 = 100_000_000;

/// Settings of the node that containers also have in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSettings {
    /// The host name of containers whose spec has none.
    pub hostname: String,
    /// Limits of the kernel, by the name of their parameter (sysctl(8)). A limit of the guest that is lower is raised
    /// to this value.
    pub minimum_limits: Vec<(String, u64)>,
    /// Parameters of the kernel that are set to a value. Unknown ones are ignored.
    pub parameters: Vec<(String, String)>,
}

/// The largest kernel that is read from a disk, in bytes. Kernels of distributions have 5 to 20 MiB.
pub const MAX_DISK_KERNEL: u64 = 256 << 20;

/// The largest sum of the initrds that are read from a disk, in bytes. Those of live systems have some hundred MiB.
pub const MAX_DISK_INITRD: u64 = 1 << 30;

/// The largest length of a kernel's command line, in bytes. Linux on x86 uses 2047 (`COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE: usize = 4096;

/// The largest length of [`DiskKernel::source`], in bytes.
pub const MAX_KERNEL_SOURCE: usize = 512;

/// How long the deletion of a container waits for its killed processes to end. The shim waits for longer, so that it
/// learns from the agent why the deletion failed.
pub const DELETION_KILL_TIMEOUT: Duration = Duration::from_secs(8);

/// The largest number of processes in a response.
pub const MAX_PROCESSES: usize = 4096;

/// The largest number of threads in a response.
pub const MAX_BLOCKED_THREADS: usize = 16;

/// A message from the agent to the shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The first message: the agent accepts requests.
    Ready(Ready),
    /// The result of a request.
    Reply(Reply),
    /// An event in the guest.
    Event(Event),
}

/// Versions of the guest, sent when the agent is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The agent's version.
    pub version: String,
    /// The guest's kernel release, as `uname -r` prints it.
    pub kernel: String,
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// The response to a successful request, or the cause of its failure.
    pub result: Result<Response, Failure>,
}

/// The result of a successful request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// The request has completed; there is no further result.
    Done,
    /// The process exists.
    Created {
        /// Its pid in the guest's initial pid namespace.
        pid: u32,
    },
    /// The processes of a container, or the first [`MAX_PROCESSES`] of them.
    Processes(#[serde(deserialize_with = "bounds::list::<_, _, MAX_PROCESSES>")] Vec<ProcessEntry>),
    /// The blocked threads of a process or container, or the first [`MAX_BLOCKED_THREADS`] of them.
    BlockedThreads(#[serde(deserialize_with = "bounds::list::<_, _, MAX_BLOCKED_THREADS>")] Vec<BlockedThread>),
    /// The kernel's index of the network interface in each requested slot, in the order of the request.
    InterfaceIndexes(#[serde(deserialize_with = "bounds::list::<_, _, { NETWORK_SLOTS as usize }>")] Vec<u32>),
    /// The resource usage of a container.
    Stats(Box<ContainerStats>),
    /// The guest's clock.
    Clock(ClockReading),
    /// What the boot loader of a disk would boot.
    DiskKernel(DiskKernel),
}

/// What the boot loader of a disk would boot. The disk chooses all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskKernel {
    /// The number of bytes that were sent over the stream of the kernel: at most [`MAX_DISK_KERNEL`].
    pub kernel_size: u64,
    /// The number of bytes that were sent over the stream of the initrd: at most [`MAX_DISK_INITRD`]. Each of several
    /// initrds is padded to a multiple of four bytes. 0 means that the kernel is booted without an initrd.
    pub initrd_size: u64,
    /// The kernel's command line: printable ASCII.
    #[serde(deserialize_with = "bounds::text::<_, MAX_COMMAND_LINE>")]
    pub command_line: String,
    /// Which configuration on the disk describes the kernel, for log lines: printable ASCII.
    #[serde(deserialize_with = "bounds::text::<_, MAX_KERNEL_SOURCE>")]
    pub source: String,
}

/// A reading of the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockReading {
    /// The guest's clock, in nanoseconds since the epoch, at some moment between request and response.
    pub nanoseconds: i64,
    /// Bounds of how far the guest's clock is ahead of the host's, in nanoseconds: the lower and the upper one. `None`
    /// if the guest cannot read the host's clock.
    pub lead: Option<(i64, i64)>,
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// Its pid in the guest's initial pid namespace.
    pub pid: u32,
    /// The exec's id, or `None` for a process that is not the first process of an exec.
    pub exec: Option<String>,
}

/// A thread whose wait in the kernel no signal ends: it is uninterruptible (state D of proc(5)), or the thread is
/// ending.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedThread {
    /// The pid of its process in the guest's initial pid namespace.
    pub pid: u32,
    /// Its thread id in that namespace.
    pub thread: u32,
    /// Its name, which the program may have chosen.
    pub name: String,
    /// How often it has given up the CPU. An unchanged number means that it is still in the same wait.
    pub switches: u64,
}

/// Why a request failed. The shim turns it into a gRPC status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind of failure, which selects the gRPC code.
    pub kind: FailureKind,
    /// The error text for the user. It has runc's wording for errors that users search for.
    pub message: String,
}

/// The kinds of failure that callers distinguish, named after gRPC codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// A container or exec with this id exists already, or the pod was set up already.
    AlreadyExists,
    /// The state of the container does not allow the request.
    FailedPrecondition,
    /// Any other failure.
    Internal,
    /// The request or its OCI spec is invalid.
    InvalidArgument,
    /// The container, exec or process does not exist.
    NotFound,
    /// The guest does not support the request.
    Unimplemented,
}

/// An event that is not the result of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A process has ended. Sent once for each process, after its [`Response::Created`]. The event of a container's
    /// first process follows those of all its execs.
    Exited(Exited),
    /// The kernel's out-of-memory killer killed a process of the container. If the kill causes an [`Event::Exited`],
    /// this event is sent before it.
    OutOfMemory {
        /// The id of the container.
        container: String,
    },
}

/// The exit of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// The id of the container.
    pub container: String,
    /// The id of the exec, or `None` for the container's first process.
    pub exec: Option<String>,
    /// The exit status, 0 to 255: 128 + n for a process that signal n killed.
    pub status: u8,
    /// The time of the exit by the guest's clock, in nanoseconds since the epoch.
    pub exited_at: u64,
    /// The number of bytes that the process and its children had written to standard output when it ended. The shim
    /// reports the exit to containerd after it has delivered that many bytes.
    pub stdout_bytes: u64,
    /// Like `stdout_bytes`, for standard error.
    pub stderr_bytes: u64,
}
