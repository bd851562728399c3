//! Start, and Exec, which adds a process to be started.

use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use nutshell_protocol::{Request, StartExec};

use super::{ANSWER_LIMIT, CREATE_LIMIT, Container, Role, Tasks, gone};
use crate::{
    oci::ContainerId,
    shim::{
        error::{Kind, TaskError},
        pod::Pod,
        pod::{NetworkNamespace, PidHolder},
        stdio,
        tasks::hooks,
        tasks::lifecycle::{Exit, Phase, UNKNOWN_STATUS},
        tasks::process::Process,
    },
};

/// What runc's shim says first; users search for it.
const START_CONTEXT: &str = "OCI runtime start failed";
const EXEC_CONTEXT: &str = "OCI runtime exec failed: exec failed: unable to start container process";

/// A process to add to a container.
#[derive(Debug)]
pub(crate) struct ExecRequest {
    /// Its id, unique in the container.
    pub(crate) exec: String,
    /// OCI `Process` as JSON.
    pub(crate) spec: Vec<u8>,
    /// Its standard streams.
    pub(crate) stdio: stdio::StdioSpec,
}

impl Tasks {
    /// Adds a process to the container `id`, to be started.
    pub(crate) fn exec(&self, id: &str, request: ExecRequest) -> Result<(), TaskError> {
        let container = self.container(id)?;
        // The guest gets the id: it must be one path component.
        if let Err(error) = request.exec.parse::<ContainerId>() {
            return Err(TaskError::new(Kind::InvalidArgument, format!("exec id: {error}")));
        }
        takes_execs(&container)?;
        if container.is_sandbox() {
            return Err(TaskError::new(
                Kind::Unimplemented,
                "a sandbox has no process of its own in the virtual machine: exec in one of the pod's containers",
            ));
        }
        let mut execs = container.execs();
        if execs.contains_key(&request.exec) {
            let text = format!("exec {} of task {id} already exists", request.exec);
            return Err(TaskError::new(Kind::AlreadyExists, text));
        }
        let process = Process::exec(request.exec.clone(), request.stdio, request.spec);
        execs.insert(request.exec.clone(), Arc::new(process));
        drop(execs);
        self.events.publish(&TaskExecAdded {
            container_id: id.to_owned(),
            exec_id: request.exec,
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    /// Starts the container `id`, or its exec `exec`, and returns the process's pid.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, TaskError> {
        let (container, process) = self.process(id, exec)?;
        if !exec.is_empty() {
            takes_execs(&container)?;
        }
        if exec.is_empty() {
            self.start_init(&container).await
        } else {
            process.lifecycle.begin_start()?;
            log::debug!("task {id} {exec}: start");
            self.start_exec(&container, &process, exec).await
        }
    }

    pub(super) async fn start_init(&self, container: &Container) -> Result<u32, TaskError> {
        let init = &container.init;
        if let Err(wrong) = init.lifecycle.begin_start() {
            if container.is_sandbox() && !container.pod.machine().was_stopped() {
                // A machine that did not boot has ended it: that is what its user has to know.
                self.set_up(&container.pod).await?;
            }
            return Err(wrong.into());
        }
        log::debug!("task {}: start", container.id);
        let begun = match container.role {
            // A pod that runs is one that takes containers.
            Role::Sandbox(_) => self.set_up(&container.pod).await,
            // Not before: clients put links into the namespace of a container that was created.
            Role::Alone { .. } => match self.connect_network(&container.pod, init.pid(), false).await {
                Ok(()) => start_in_guest(container).await,
                Err(error) => Err(error),
            },
            Role::Member { .. } => start_in_guest(container).await,
        };
        if let Err(error) = begun {
            init.lifecycle.start_failed(None);
            return Err(not_gone(error).during(START_CONTEXT));
        }
        if container.is_task() {
            self.events.publish(&TaskStart {
                container_id: container.id.to_string(),
                pid: init.pid(),
                ..TaskStart::default()
            });
        }
        init.lifecycle.started();
        log::debug!("task {}: started", container.id);
        // It runs: a hook that fails is no reason to end it (OCI spec, "Lifecycle", step 10).
        hooks::run_all("poststart", &container.hooks.poststart, "running", container.subject()).await;
        Ok(init.pid())
    }

    /// Gives the machine of a pod the network of the namespace in which the process `pid` lives.
    pub(super) async fn connect_network(&self, pod: &Pod, pid: u32, forwarding: bool) -> Result<(), TaskError> {
        let ready = pod.machine().ready(self.configuration.ready_timeout).await;
        ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
        let connected = pod
            .machine()
            .within(CREATE_LIMIT, pod.connect_network(pid, forwarding))
            .await;
        match connected {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(TaskError::unknown(error.to_string())),
            None => Err(TaskError::unknown(
                "the virtual machine did not take its network in time",
            )),
        }
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        exec: &str,
    ) -> Result<u32, TaskError> {
        match run_exec(container, process, exec, &self.stdio).await {
            Ok(guest_pid) => {
                process.set_guest_pid(guest_pid);
                self.follow_holder(container, process);
                self.events.publish(&TaskExecStarted {
                    container_id: container.id.to_string(),
                    exec_id: exec.to_owned(),
                    pid: process.pid(),
                    ..TaskExecStarted::default()
                });
                process.lifecycle.started();
                Ok(process.pid())
            }
            Err(error) => {
                process.close_streams(container.pod.machine()).await;
                process.release();
                process.lifecycle.start_failed(Some(Exit::now(UNKNOWN_STATUS)));
                Err(not_gone(error))
            }
        }
    }
}

async fn start_in_guest(container: &Container) -> Result<(), TaskError> {
    let start = Request::StartContainer {
        container: container.id.to_string(),
    };
    let agent = container.pod.machine().agent();
    container.ask(ANSWER_LIMIT, agent.run(start)).await
}

async fn run_exec(
    container: &Container,
    process: &Process,
    exec: &str,
    context: &stdio::StdioContext,
) -> Result<u32, TaskError> {
    let machine = container.pod.machine();
    let opened = process
        .request
        .open(exec, context)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()).during(EXEC_CONTEXT))?;
    let holder = PidHolder::spawn(&NetworkNamespace::Inherited)
        .map_err(|error| TaskError::unknown(format!("make a pid for the process: {error}")))?;
    process.hold(Arc::new(holder));
    let (streams, stdio) = match opened.connect(machine, process.size()).await {
        Ok(connected) => connected,
        Err(error) => return Err(gone(&container.pod, &error).await.during(EXEC_CONTEXT)),
    };
    process.set_streams(streams);
    let start = Request::StartExec(StartExec {
        container: container.id.to_string(),
        exec: exec.to_owned(),
        process: process.take_spec(),
        stdio,
    });
    container
        .ask(CREATE_LIMIT, machine.agent().create(start))
        .await
        .map_err(|error| error.during(EXEC_CONTEXT))
}

fn takes_execs(container: &Container) -> Result<(), TaskError> {
    let state = match container.init.lifecycle.phase() {
        Phase::Creating | Phase::Created | Phase::Starting | Phase::Running => return Ok(()),
        phase => phase.name(),
    };
    let text = format!("cannot exec in a {state} container");
    Err(TaskError::new(Kind::FailedPrecondition, text))
}

/// "Not found" would be read as "the task is gone": here it is something that the process requirements.
fn not_gone(error: TaskError) -> TaskError {
    match error.kind() {
        Kind::NotFound => TaskError::unknown(error.to_string()),
        _ => error,
    }
}
