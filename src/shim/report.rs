//! The report of a shim to an administrator, and the other messages of its private service, in JSON.

use std::path::PathBuf;

use nutshell_protocol::ShellTerminal;
use serde::{Deserialize, Serialize};

/// The name of the ttrpc service. containerd does not know it.
pub(crate) const ADMIN_SERVICE: &str = "nutshell.admin.v1.Admin";

/// The method that returns a [`ShimReport`] without the statistics of the vmms. Its request is empty.
pub(crate) const REPORT: &str = "Report";

/// The method that returns a complete [`ShimReport`]. It waits for the vmms, for a second at most. Its request is
/// empty.
pub(crate) const FULL_REPORT: &str = "FullReport";

/// The method that returns the end of a guest's console, as text. Its request is the id of a container of the pod.
pub(crate) const CONSOLE: &str = "Console";

/// The method that starts a shell in a guest. Its request is a [`ShellRequest`], its response is empty.
pub(crate) const SHELL: &str = "Shell";

/// A shell in the guest for an administrator.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShellRequest {
    /// The id of a container of the pod.
    pub(crate) id: String,
    /// A Unix socket at which the client listens. The shim connects to it once, for the messages of the shell
    /// ([`nutshell_protocol::ShellInput`], [`nutshell_protocol::ShellOutput`]).
    pub(crate) socket: PathBuf,
    /// `None` if the client has no terminal.
    pub(crate) terminal: Option<ShellTerminal>,
}

/// The state of a shim.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShimReport {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Containers and sandboxes, by id.
    pub(crate) containers: Vec<ContainerReport>,
}

/// The state of a container or a sandbox.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerReport {
    pub(crate) id: String,
    /// `container`, `sandbox`, `member` for a container of a pod, or `vm` for a virtual machine with a user's kernel.
    pub(crate) kind: String,
    /// `created`, `running`, `paused`, `stopped` or `deleted`.
    pub(crate) state: String,
    pub(crate) exit_status: Option<u32>,
    /// Its pid on the host.
    pub(crate) pid: u32,
    /// The pid of its first process in the guest, 0 for a sandbox.
    pub(crate) guest_pid: u32,
    pub(crate) bundle: String,
    /// The kind and version of the agent in the guest of a virtual machine, such as `nutshell 0.2.0` or `QEMU 9.2.0`.
    /// `None` if none answers, or none was asked.
    #[serde(default)]
    pub(crate) guest_agent: Option<String>,
    /// The ids of its execs.
    pub(crate) execs: Vec<String>,
    /// Seconds since its creation was requested.
    pub(crate) age_seconds: u64,
    /// The time from the request of its creation until it was created, in milliseconds; `None` before.
    pub(crate) create_milliseconds: Option<u64>,
    /// The time from the request of its creation until it was started, in milliseconds; `None` before.
    pub(crate) started_milliseconds: Option<u64>,
    /// How long its start took, in milliseconds; `None` if it has not started.
    pub(crate) start_milliseconds: Option<u64>,
    /// The machine that it runs in, which it shares with the other containers of its pod.
    pub(crate) machine: MachineReport,
}

/// The state of a virtual machine.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MachineReport {
    /// The pid of its vmm.
    pub(crate) pid: u32,
    /// The id of the sandbox, or of the single container, that it was started for.
    pub(crate) sandbox: String,
    /// On the host. `None` if the machine shares no files.
    pub(crate) file_server_pid: Option<u32>,
    /// Its current memory, in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    /// The kernel's release in the guest; `None` before the agent is ready.
    pub(crate) kernel: Option<String>,
    /// The time from the boot command until the agent was ready, in milliseconds; `None` before.
    pub(crate) boot_milliseconds: Option<u64>,
    pub(crate) phases: MachinePhases,
    /// The counters of its devices; empty if the vmm was not asked.
    pub(crate) devices: Vec<DeviceReport>,
    /// Why `devices` is empty although the vmm was asked.
    pub(crate) devices_error: Option<String>,
}

/// When a machine passed the phases of its start, in milliseconds since it was requested, that is, since the request
/// of its pod's sandbox or of the single container. `None` before, and for phases that only the vmm knows if it gave no
/// answer.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachinePhases {
    /// The vmm process was started. 0 if that was before the request.
    pub(crate) spawn_milliseconds: u64,
    /// The vmm had built the machine.
    pub(crate) vmm_ready_milliseconds: Option<u64>,
    /// The guest's kernel did its first I/O.
    pub(crate) kernel_milliseconds: Option<u64>,
    /// The agent in the guest was ready.
    pub(crate) agent_ready_milliseconds: Option<u64>,
}

/// The counters of a device since it was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceReport {
    /// The serial of a disk, `net-` and the number of a network interface, or the kind of another device.
    pub(crate) name: String,
    /// The file of the host behind a disk.
    pub(crate) path: Option<String>,
    /// Requests, packets or messages.
    pub(crate) requests: u64,
    /// Requests that failed, data that was lost, and queues that are no longer served.
    pub(crate) errors: u64,
    /// Bytes that the guest received.
    pub(crate) bytes_to_guest: u64,
    /// Bytes that the guest sent.
    pub(crate) bytes_from_guest: u64,
    /// How often a queue or stream made no progress for 10 s.
    pub(crate) stalls: u64,
}
