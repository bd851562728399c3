//! What a shim tells an administrator about itself: the messages of its private service, in JSON.

use serde::{Deserialize, Serialize};

/// The name of the ttrpc service. containerd does not know it.
pub(crate) const ADMIN_SERVICE: &str = "nutshell.admin.v1.Admin";

/// The method that returns a [`ShimReport`]. Its request is empty.
pub(crate) const REPORT: &str = "Report";

/// The method that returns the end of a guest's console, as text. Its request is the id of a container of the pod.
pub(crate) const CONSOLE: &str = "Console";

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
    /// `container`, `sandbox`, or `member` for a container of a pod.
    pub(crate) kind: String,
    /// `created`, `running`, `paused`, `stopped` or `deleted`.
    pub(crate) state: String,
    pub(crate) exit_status: Option<u32>,
    /// Its pid on the host.
    pub(crate) pid: u32,
    /// The pid of its first process in the guest, 0 for a sandbox.
    pub(crate) guest_pid: u32,
    pub(crate) bundle: String,
    /// The ids of its execs.
    pub(crate) execs: Vec<String>,
    /// Seconds since its creation began.
    pub(crate) age_seconds: u64,
    /// How long its creation took, in milliseconds; `None` while it is in progress.
    pub(crate) create_milliseconds: Option<u64>,
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
    /// The pid of its file server, if it has one.
    pub(crate) file_server_pid: Option<u32>,
    /// Its present memory, in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    /// The kernel's release in the guest; `None` before the agent is ready.
    pub(crate) kernel: Option<String>,
    /// From the boot command until the agent was ready, in milliseconds; `None` before.
    pub(crate) boot_milliseconds: Option<u64>,
}
