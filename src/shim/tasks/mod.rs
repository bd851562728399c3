//! The containers of this shim and what happens to them: the one place where a call of containerd
//! meets a machine.
//!
//! Lives here: what each Task call does, in the types of this crate. May not live here: protobuf and
//! ttrpc (those are [`super::service`] and [`super::sandbox_service`]), how a machine is made
//! ([`super::pod`]). `create`, `start`, `control` and `delete` each have the calls of their name,
//! `sandbox` has those of the Sandbox service, `exit` what happens by itself, `size` what becomes of limits.
//!
//! All of it runs on the shim's main thread. What a call has begun is finished even if its caller
//! goes away, so that nothing is left half-done.

mod control;
mod create;
mod delete;
mod exit;
mod hooks;
pub(crate) mod lifecycle;
mod process;
mod sandbox;
mod size;
mod start;
mod totals;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};

use nutshell_protocol::FailureKind;
use tokio::sync::watch;

pub(crate) use self::{create::CreateRequest, sandbox::SandboxRequest, start::ExecRequest};
use super::{
    configuration::Configuration,
    error::{Kind, TaskError},
    events::EventQueue,
    machine::AgentError,
    pod::{Launcher, Pod},
    stdio::{StdioContext, StreamRegistry},
    tasks::hooks::Subject,
    tasks::lifecycle::Phase,
    tasks::process::Process,
};
use crate::oci::{ContainerId, Hooks, Limits};

/// How long the output of a process that ended may take to reach a reader that does not read, before
/// the end is reported, and again before the process is forgotten.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long the vmm may take to close streams.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// How long the agent may take for what is done at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long the agent may take to create a container or to start an exec.
const CREATE_LIMIT: Duration = Duration::from_secs(30);

/// How long the agent may take to kill before its machine is ended instead.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How long the agent may take for what only makes an answer richer.
const HINT_LIMIT: Duration = Duration::from_secs(2);

/// How long the guest may take to write back its disks, before the machine is ended.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(10);

/// The status of a process that was killed: 128 + SIGKILL.
const KILLED: u32 = 137;

/// How a container stands to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It is the pod.
    Alone {
        /// Its root is a disk that the guest may have to write back.
        writes_disk: bool,
    },
    /// It is the pod's sandbox: nothing of it runs in the guest. Its first process's lifecycle is the
    /// state of the pod.
    Sandbox(SandboxApi),
    /// It lives in the pod of a sandbox.
    Member {
        /// Its root is a disk that the guest may have to write back.
        writes_disk: bool,
    },
}

/// How containerd speaks of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SandboxApi {
    /// As a container, through the Task service (`sandboxer = "podsandbox"`).
    Task,
    /// Through the Sandbox service (`sandboxer = "shim"`): it is no task, and events of it are none.
    Service,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    id: ContainerId,
    bundle: PathBuf,
    role: Role,
    created_at: SystemTime,
    pod: Arc<Pod>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    hooks: Hooks,
    /// What bounds it now.
    limits: Mutex<Limits>,
    /// Held while that changes.
    updating: tokio::sync::Mutex<()>,
}

impl Container {
    /// Nothing of it runs in the guest.
    fn is_sandbox(&self) -> bool {
        matches!(self.role, Role::Sandbox(_))
    }

    /// The Task service knows it, and its events are told.
    fn is_task(&self) -> bool {
        self.role != Role::Sandbox(SandboxApi::Service)
    }

    /// As its hooks know it.
    fn subject(&self) -> Subject<'_> {
        Subject {
            id: &self.id,
            bundle: &self.bundle,
            pid: self.init.pid(),
        }
    }

    /// Its folder.
    pub(crate) fn bundle(&self) -> &std::path::Path {
        &self.bundle
    }

    fn limits(&self) -> Limits {
        *self.limits.lock()
    }

    fn set_limits(&self, limits: Limits) {
        *self.limits.lock() = limits;
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock()
    }

    fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    /// The container's first process, or its exec `exec` if that is not empty.
    fn process(&self, exec: &str) -> Result<Arc<Process>, TaskError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec)
            .cloned()
            .ok_or_else(|| TaskError::new(Kind::NotFound, format!("exec {exec} of task {} not found", self.id)))
    }

    /// Asks the guest, for at most `limit` of its time.
    async fn ask<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, TaskError> {
        ask(&self.pod, limit, answer).await
    }
}

/// Asks the agent of `pod`, for at most `limit` of its time.
async fn ask<T>(
    pod: &Pod,
    limit: Duration,
    answer: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, TaskError> {
    let answer = pod.machine().within(limit, answer).await;
    match answer {
        Some(Err(error @ AgentError::Gone)) => Err(gone(pod, &error).await),
        answer => answered(limit, answer),
    }
}

/// What to say of an error that means that the machine is ending: the machine knows why.
async fn gone(pod: &Pod, error: &impl std::error::Error) -> TaskError {
    let text = match tokio::time::timeout(CLOSE_LIMIT, pod.machine().ended()).await {
        Ok(ending) => ending.to_string(),
        Err(_) => error.to_string(),
    };
    TaskError::new(Kind::Unavailable, text)
}

/// The agent's answer, or why there is none.
fn answered<T>(limit: Duration, answer: Option<Result<T, AgentError>>) -> Result<T, TaskError> {
    let error = match answer {
        Some(Ok(answer)) => return Ok(answer),
        Some(Err(error)) => error,
        None => {
            let text = format!("the virtual machine did not answer within {} s", limit.as_secs());
            return Err(TaskError::new(Kind::Unavailable, text));
        }
    };
    let kind = match &error {
        AgentError::Failed(failure) => match failure.kind {
            FailureKind::AlreadyExists => Kind::AlreadyExists,
            FailureKind::FailedPrecondition => Kind::FailedPrecondition,
            FailureKind::Internal => Kind::Unknown,
            FailureKind::InvalidArgument => Kind::InvalidArgument,
            FailureKind::NotFound => Kind::NotFound,
            FailureKind::Unimplemented => Kind::Unimplemented,
        },
        AgentError::Gone => Kind::Unavailable,
        AgentError::TooLarge(_) => Kind::InvalidArgument,
        AgentError::Unexpected => Kind::Unknown,
    };
    Err(TaskError::new(kind, error.to_string()))
}

/// All containers of this shim.
#[derive(Debug)]
pub(crate) struct Tasks {
    configuration: Configuration,
    launcher: Box<dyn Launcher>,
    events: EventQueue,
    stdio: StdioContext,
    table: Mutex<Table>,
    stopping: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Table {
    containers: HashMap<ContainerId, Arc<Container>>,
    /// Ids of containers that are being made, or are made.
    taken: HashSet<ContainerId>,
}

impl Tasks {
    /// None yet.
    pub(crate) fn new(
        configuration: Configuration,
        launcher: impl Launcher,
        events: EventQueue,
        stdio: StdioContext,
    ) -> Arc<Self> {
        Arc::new(Self {
            configuration,
            launcher: Box::new(launcher),
            events,
            stdio,
            table: Mutex::default(),
            stopping: watch::Sender::new(false),
        })
    }

    /// Where clients open streams.
    pub(crate) fn streaming(&self) -> &StreamRegistry {
        &self.stdio.streaming
    }

    /// The container, from the moment that its creation was answered to the end of its deletion.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.created(id)
            .filter(|container| container.is_task())
            .ok_or_else(|| TaskError::new(Kind::NotFound, format!("task {id} not found")))
    }

    /// As [`Self::container`], with those that are no tasks.
    fn created(&self, id: &str) -> Option<Arc<Container>> {
        let id = id.parse::<ContainerId>().ok()?;
        let found = self.table().containers.get(&id).cloned();
        found.filter(|container| container.init.lifecycle.phase() != Phase::Creating)
    }

    /// The process `exec` of container `id`, its first one if `exec` is empty.
    pub(crate) fn process(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    /// Ends the shim if neither a container nor a sandbox is left, or anyway if `now`. False if it goes
    /// on.
    pub(crate) fn shut_down(&self, now: bool) -> bool {
        let idle = self.table().taken.is_empty();
        let stop = idle || now;
        if stop {
            self.stopping.send_replace(true);
        }
        stop
    }

    /// The shim is to end.
    #[cfg(test)]
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits until the shim is to end.
    pub(crate) async fn stopped(&self) {
        let mut stopping = self.stopping.subscribe();
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            // The sender is borrowed with `self`.
            std::future::pending::<()>().await;
        }
    }

    /// Ends what still runs.
    pub(crate) async fn end_all(&self) {
        let containers: Vec<_> = self.table().containers.values().cloned().collect();
        for container in &containers {
            container.pod.end().await;
        }
        for container in &containers {
            container.init.lifecycle.exit().await;
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }

    /// The containers of the pod with this number.
    fn members(&self, pod: u64) -> Vec<Arc<Container>> {
        let table = self.table();
        let members = table
            .containers
            .values()
            .filter(|container| container.pod.number() == pod);
        members.cloned().collect()
    }
}
