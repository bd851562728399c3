//! Start, and Exec, which adds a process to be started later.

use std::{sync::Arc, time::Instant};

use containerd_shim::protos::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use nutshell_protocol::Request;

use super::{
    agent_call::run_in_guest,
    container::{
        Container, Role, hooks,
        lifecycle::{Exit, Phase, UNKNOWN_STATUS},
        process::Process,
        signal::SIGKILL,
    },
    control::signal_in_guest,
    limits::REQUEST_LIMIT,
    steps::exec::start_exec_in_guest,
    table::Tasks,
    virtual_machine::exec::check_can_exec,
};
use crate::{
    oci::ContainerId,
    shim::{
        error::{ErrorCode, TaskError},
        stdio::StdioSpec,
    },
};

/// The prefix of the error texts of a failed Start: the same as in runc's shim, because users search for it.
const START_CONTEXT: &str = "OCI runtime start failed";

/// A process to add to a container.
#[derive(Debug)]
pub(crate) struct ExecRequest {
    /// Its id, unique in the container.
    pub(crate) exec: String,
    /// OCI `Process` as JSON.
    pub(crate) spec: Vec<u8>,
    /// Its standard streams.
    pub(crate) stdio: StdioSpec,
}

impl Tasks {
    /// Adds a process to the container `id`. [`Self::start`] runs it.
    pub(crate) async fn exec(&self, id: &str, request: ExecRequest) -> Result<(), TaskError> {
        let stdio = request.stdio.clone();
        let added = self.add_exec(id, request).await;
        added.inspect_err(|error| {
            // The streams of an exec that exists belong to it.
            if error.code() != ErrorCode::AlreadyExists {
                stdio.close_unused(self.streaming());
            }
        })
    }

    async fn add_exec(&self, id: &str, request: ExecRequest) -> Result<(), TaskError> {
        let container = self.container(id)?;
        // The id is sent to the guest, where it must be one path component.
        if let Err(error) = request.exec.parse::<ContainerId>() {
            return Err(TaskError::new(ErrorCode::InvalidArgument, format!("exec id: {error}")));
        }
        check_accepts_execs(&container)?;
        if container.is_sandbox() {
            return Err(TaskError::new(
                ErrorCode::Unimplemented,
                "a sandbox has no process in the virtual machine: exec in one of the pod's containers",
            ));
        }
        if let Some(machine) = &container.virtual_machine {
            check_can_exec(machine, request.stdio.terminal).await?;
        }
        let mut execs = container.execs();
        if execs.contains_key(&request.exec) {
            let text = format!("exec {} of task {id} already exists", request.exec);
            return Err(TaskError::new(ErrorCode::AlreadyExists, text));
        }
        let process = Process::new_exec(request.exec.clone(), request.stdio, request.spec);
        execs.insert(request.exec.clone(), Arc::new(process));
        drop(execs);
        self.events.publish(
            id,
            TaskExecAdded {
                container_id: id.to_owned(),
                exec_id: request.exec,
                ..TaskExecAdded::default()
            },
        );
        Ok(())
    }

    /// Starts the container `id`, or its exec `exec` if that is not empty, and returns the process's pid.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, TaskError> {
        let (container, process) = self.process(id, exec)?;
        if !exec.is_empty() {
            check_accepts_execs(&container)?;
        }
        if exec.is_empty() {
            self.start_init(&container).await
        } else {
            process.lifecycle.begin_start()?;
            log::debug!("task {id} {exec}: start");
            self.start_exec(&container, &process, exec).await
        }
    }

    /// Starts the first process of a container, or a sandbox, and returns its pid.
    pub(super) async fn start_init(self: &Arc<Self>, container: &Container) -> Result<u32, TaskError> {
        let init = &container.init;
        if let Err(wrong) = init.lifecycle.begin_start() {
            if container.is_sandbox() && !container.pod.machine().was_stopped() {
                // If the sandbox ended because its machine did not boot, return that reason.
                self.set_up_pod(&container.pod).await?;
            }
            return Err(wrong.into());
        }
        let begun = Instant::now();
        log::debug!("task {}: start", container.id);
        let started = match container.role {
            _ if container.virtual_machine.is_some() => self.start_virtual_machine(container).await,
            // A running sandbox must accept containers.
            Role::Sandbox(_) => self.set_up_pod(&container.pod).await,
            // Connected here, not at Create: clients add network interfaces to the namespace of a created container.
            Role::Single { .. } => match self.connect_network(&container.pod, init.pid(), false).await {
                Ok(()) => start_in_guest(container).await,
                Err(error) => Err(error),
            },
            Role::Member { .. } => start_in_guest(container).await,
        };
        if let Err(error) = started {
            if !container.is_sandbox() && container.virtual_machine.is_none() {
                end_unanswered_start(container, init, &error).await;
            }
            init.lifecycle.mark_start_failed(None);
            return Err(replace_not_found(error).during(START_CONTEXT));
        }
        if container.is_task() {
            self.events.publish(
                container.id.as_ref(),
                TaskStart {
                    container_id: container.id.to_string(),
                    pid: init.pid(),
                    ..TaskStart::default()
                },
            );
        }
        container.note_started(begun);
        init.lifecycle.mark_started();
        log::debug!("task {}: started", container.id);
        // The failure of a poststart hook does not end the container (OCI spec, "Lifecycle", step 10).
        let hooks = &container.hooks.poststart;
        hooks::run_all("poststart", hooks, "running", container.hook_container()).await;
        Ok(init.pid())
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        exec: &str,
    ) -> Result<u32, TaskError> {
        let started = match &container.virtual_machine {
            Some(machine) => {
                self.start_exec_in_virtual_machine(container, machine, process, exec)
                    .await
            }
            None => {
                let machine = container.pod.machine();
                start_exec_in_guest(container, process, exec, &self.stdio, machine.agent())
                    .await
                    .map(|guest_pid| process.set_guest_pid(guest_pid))
            }
        };
        match started {
            Ok(()) => {
                self.watch_pid_holder(container, process);
                self.events.publish(
                    container.id.as_ref(),
                    TaskExecStarted {
                        container_id: container.id.to_string(),
                        exec_id: exec.to_owned(),
                        pid: process.pid(),
                        ..TaskExecStarted::default()
                    },
                );
                process.lifecycle.mark_started();
                Ok(process.pid())
            }
            Err(error) => {
                end_unanswered_start(container, process, &error).await;
                process.close_streams(&container.pod.machine()).await;
                process.release_pid();
                process.lifecycle.mark_start_failed(Some(Exit::now(UNKNOWN_STATUS)));
                Err(replace_not_found(error))
            }
        }
    }
}

async fn start_in_guest(container: &Container) -> Result<(), TaskError> {
    let start = Request::StartContainer {
        container: container.id.to_string(),
    };
    run_in_guest(&container.pod, REQUEST_LIMIT, start).await
}

/// Kills a process whose start failed with `error` because the guest did not answer: it may have started the process,
/// or may do so later.
async fn end_unanswered_start(container: &Container, process: &Process, error: &TaskError) {
    let has_agent = container.virtual_machine.is_none();
    if error.code() != ErrorCode::Unavailable || !has_agent || container.pod.machine().has_ended() {
        return;
    }
    match signal_in_guest(container, process, SIGKILL, process.exec.is_none()).await {
        Err(error) if error.code() != ErrorCode::NotFound => {
            let exec = process.exec.as_deref().unwrap_or_default();
            log::warn!(
                "task {} {exec}: cannot kill a process that did not start in time: {error}",
                container.id
            );
        }
        _ => {}
    }
}

/// Fails if the container is paused or has ended.
fn check_accepts_execs(container: &Container) -> Result<(), TaskError> {
    let state = match container.init.lifecycle.phase() {
        Phase::Creating | Phase::Created | Phase::Starting | Phase::Running => return Ok(()),
        phase => phase.name(),
    };
    let text = format!("cannot exec in a {state} container");
    Err(TaskError::new(ErrorCode::FailedPrecondition, text))
}

/// Replaces `NOT_FOUND`, which containerd would take to mean that the task is gone. Here it means that something that
/// the process needs is missing.
fn replace_not_found(error: TaskError) -> TaskError {
    match error.code() {
        ErrorCode::NotFound => TaskError::unknown(error.to_string()),
        _ => error,
    }
}
