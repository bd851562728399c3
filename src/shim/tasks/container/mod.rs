//! One container: its place in a pod, its processes and its limits.
//!
//! Belongs here: the state of a container and of its processes, and the hooks of its spec. Does not belong here: the
//! table of all containers, and the calls that act on several of them. The other files of [`tasks`](super) call it.

pub(super) mod hooks;
pub(super) mod lifecycle;
pub(super) mod process;
pub(super) mod signal;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use nutshell_protocol::Request;
use parking_lot::{Mutex, MutexGuard};

use self::{hooks::HookContainer, process::Process};
use super::agent_call::run_in_guest;
use crate::{
    control::monotonic_now,
    oci::{ContainerId, Hooks, Limits},
    shim::{
        error::{ErrorCode, TaskError},
        pod::Pod,
        stdio::StdioSpec,
        vm::VirtualMachine,
    },
};

/// The minimum time between two announcements that a container ran out of memory.
const OUT_OF_MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// The relation of a container to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It is the only container of the pod.
    Single {
        /// Its root is a disk that the guest may have to write back.
        writes_disk: bool,
    },
    /// It is the pod's sandbox, which has no process in the guest. The lifecycle of its first process is the state
    /// of the pod.
    Sandbox(SandboxApi),
    /// It is in the pod of a sandbox.
    Member {
        /// Its root is a disk that the guest may have to write back.
        writes_disk: bool,
    },
}

/// How long the phases of a container took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timings {
    /// When its creation was requested, on the clock of [`monotonic_now`].
    requested_at: Duration,
    /// The time since then.
    pub(super) age: Duration,
    /// The time from the request until it was created. `None` before.
    pub(super) created: Option<Duration>,
    /// The time from the request of its creation until it was started. `None` before.
    pub(super) started: Option<Duration>,
    /// How long its start took. `None` if it has not started.
    pub(super) start: Option<Duration>,
}

impl Timings {
    /// The timings of a container that was requested at `requested_at`.
    fn since(requested_at: Duration) -> Self {
        Self {
            requested_at,
            age: Duration::ZERO,
            created: None,
            started: None,
            start: None,
        }
    }

    /// The time since the request.
    fn elapsed(&self) -> Duration {
        monotonic_now().saturating_sub(self.requested_at)
    }
}

/// Which API created the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SandboxApi {
    /// The Task service, as a container (`sandboxer = "podsandbox"`).
    Task,
    /// The Sandbox service (`sandboxer = "shim"`). The sandbox is no task, and has no task events.
    Service,
}

#[derive(Debug)]
pub(crate) struct Container {
    pub(super) id: ContainerId,
    pub(super) bundle: PathBuf,
    pub(super) role: Role,
    pub(super) created_at: SystemTime,
    pub(super) pod: Arc<Pod>,
    /// Set if it is a virtual machine with a user's disk or kernel.
    pub(super) virtual_machine: Option<Arc<VirtualMachine>>,
    /// Its first process.
    pub(super) init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    pub(super) hooks: Hooks,
    limits: Mutex<Limits>,
    timings: Mutex<Timings>,
    /// When containerd was last told that the container ran out of memory.
    out_of_memory_announced: Mutex<Option<Instant>>,
    /// Whether processes of it cannot end.
    abandoned: AtomicBool,
    /// Held by a call that changes `limits`.
    pub(super) update_lock: tokio::sync::Mutex<()>,
}

impl Container {
    /// A container whose creation is requested now.
    pub(super) fn new(
        id: ContainerId,
        bundle: PathBuf,
        role: Role,
        pod: Arc<Pod>,
        stdio: StdioSpec,
        hooks: Hooks,
        limits: Limits,
    ) -> Self {
        Self {
            id,
            bundle,
            role,
            created_at: SystemTime::now(),
            pod,
            virtual_machine: None,
            init: Arc::new(Process::new_init(stdio)),
            execs: Mutex::default(),
            hooks,
            limits: Mutex::new(limits),
            timings: Mutex::new(Timings::since(monotonic_now())),
            out_of_memory_announced: Mutex::default(),
            abandoned: AtomicBool::new(false),
            update_lock: tokio::sync::Mutex::default(),
        }
    }

    /// The container as a virtual machine with a user's disk or kernel.
    pub(super) fn with_virtual_machine(self, virtual_machine: Arc<VirtualMachine>) -> Self {
        Self {
            virtual_machine: Some(virtual_machine),
            ..self
        }
    }

    /// The container, requested at `requested_at` on the clock of [`monotonic_now`].
    pub(super) fn with_request_time(self, requested_at: Duration) -> Self {
        *self.timings.lock() = Timings::since(requested_at);
        self
    }

    /// Whether it is a sandbox, which has no process in the guest.
    pub(super) fn is_sandbox(&self) -> bool {
        matches!(self.role, Role::Sandbox(_))
    }

    /// Whether the agent runs it. A sandbox has no process in the guest, and a virtual machine is the guest itself.
    pub(super) fn is_in_guest(&self) -> bool {
        !self.is_sandbox() && self.virtual_machine.is_none()
    }

    /// Whether it is available in the Task service, and its events are published.
    pub(super) fn is_task(&self) -> bool {
        self.role != Role::Sandbox(SandboxApi::Service)
    }

    /// The state that its hooks receive.
    pub(super) fn hook_container(&self) -> HookContainer<'_> {
        HookContainer {
            id: &self.id,
            bundle: &self.bundle,
            pid: self.init.pid(),
        }
    }

    /// The folder of the container's bundle.
    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    pub(super) fn limits(&self) -> Limits {
        *self.limits.lock()
    }

    pub(super) fn set_limits(&self, limits: Limits) {
        *self.limits.lock() = limits;
    }

    /// Whether to announce now that it ran out of memory. True at most once per [`OUT_OF_MEMORY_INTERVAL`]: containerd
    /// only needs to know that it happened, and writes each event to its disk.
    pub(super) fn should_announce_out_of_memory(&self) -> bool {
        let mut announced = self.out_of_memory_announced.lock();
        let due = announced.is_none_or(|at| at.elapsed() >= OUT_OF_MEMORY_INTERVAL);
        if due {
            *announced = Some(Instant::now());
        }
        due
    }

    /// How long its phases took until now.
    pub(super) fn timings(&self) -> Timings {
        let timings = *self.timings.lock();
        Timings {
            age: timings.elapsed(),
            ..timings
        }
    }

    /// Notes that its creation has ended.
    pub(super) fn note_created(&self) {
        let mut timings = self.timings.lock();
        timings.created = Some(timings.elapsed());
    }

    /// Notes that its start has ended, which began at `begun`.
    pub(super) fn note_started(&self, begun: Instant) {
        let mut timings = self.timings.lock();
        timings.started = Some(timings.elapsed());
        timings.start = Some(begun.elapsed());
    }

    /// Notes that processes of it cannot end. The guest must not wait for them when it deletes the container.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::abandon`] was called.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// The container's execs by id, locked.
    pub(super) fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock()
    }

    /// A copy of the list of its execs, for use across an `await`.
    pub(super) fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    /// The container's first process, or its exec `exec` if that is not empty.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`.
    pub(super) fn process(&self, exec: &str) -> Result<Arc<Process>, TaskError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs().get(exec).cloned().ok_or_else(|| {
            TaskError::new(
                ErrorCode::NotFound,
                format!("exec {exec} of task {} not found", self.id),
            )
        })
    }

    /// Makes the guest end all containers of the pod and write its disks back.
    pub(super) async fn write_back_disks(&self, limit: Duration) {
        if let Err(error) = run_in_guest(&self.pod, limit, Request::Shutdown).await {
            log::error!(
                "task {}: cannot write its disk back, which may lack the last writes: {error}",
                self.id
            );
        }
    }
}
