//! Kill, and the other calls of the Task service for an existing process.

use std::{process, sync::Arc};

use containerd_shim::protos::events::task::{TaskPaused, TaskResumed};
use nutshell_protocol::{ContainerStats, ProcessEntry, Request, Response};

use super::{
    agent_call::{already_finished, call_agent, check_response, run_in_guest},
    container::{
        Container,
        lifecycle::{Exit, Phase},
        process::Process,
        signal::{SIGKILL, is_terminating},
    },
    limits::{KILL_LIMIT, PIDS_LIMIT, REQUEST_LIMIT, STATS_LIMIT, WRITE_BACK_LIMIT},
    table::Tasks,
    virtual_machine::{
        agent_exec::resize_exec_by_agent,
        calls::{set_limits_of_virtual_machine, signal_virtual_machine, virtual_machine_stats},
        exec::signal_exec_in_virtual_machine,
    },
};
use crate::shim::{
    error::{ErrorCode, TaskError},
    machine::{AgentError, describe_request},
    stdio::StdioSpec,
};

/// The response to State.
#[derive(Debug)]
pub(crate) struct ProcessState {
    pub(crate) container: Arc<Container>,
    /// The pid on this host, 0 for an exec that was not started.
    pub(crate) pid: u32,
    pub(crate) phase: Phase,
    /// Its standard streams as containerd specified them.
    pub(crate) stdio_spec: StdioSpec,
}

/// A process in the response to Pids.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ListedProcess {
    /// The pid on this host if containerd started the process, else a number that no process of the host can have.
    pub(crate) pid: u32,
    /// Its exec id, if containerd started it with Exec.
    pub(crate) exec: Option<String>,
}

impl Tasks {
    /// State. Never waits.
    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<ProcessState, TaskError> {
        let (container, process) = self.process(id, exec)?;
        Ok(ProcessState {
            pid: process.pid(),
            phase: process.lifecycle.phase(),
            stdio_spec: process.stdio_spec.clone(),
            container,
        })
    }

    /// Connect: the pids of shim and task, 0 for an unknown task. Never waits.
    pub(crate) fn connect(&self, id: &str) -> (u32, u32) {
        let task = self.container(id).map_or(0, |container| container.init.pid());
        (process::id(), task)
    }

    /// Wait: returns when the process has ended.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit, TaskError> {
        let (_, process) = self.process(id, exec)?;
        Ok(process.lifecycle.wait_exit().await)
    }

    /// Kill: sends a signal to a process, or to all processes of its container.
    pub(crate) async fn kill(self: &Arc<Self>, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let (container, process) = self.process(id, exec)?;
        self.kill_process(&container, &process, signal, all).await
    }

    /// [`Self::kill`] of a process that was looked up before.
    pub(super) async fn kill_process(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        if process.lifecycle.phase().exit().is_some() {
            return Err(already_finished());
        }
        if process.is_unstarted_exec() {
            return Err(TaskError::new(ErrorCode::FailedPrecondition, "process not started"));
        }
        if container.is_sandbox() {
            // Like the pause program, a sandbox ends on a terminating signal and ignores others.
            if is_terminating(signal) {
                self.end_sandbox(container, 128 + signal, WRITE_BACK_LIMIT).await;
            }
            return Ok(());
        }
        if let Some(machine) = &container.virtual_machine {
            return match process.exec {
                None => signal_virtual_machine(container, machine, signal).await,
                Some(_) => signal_exec_in_virtual_machine(container, machine, process, signal).await,
            };
        }
        let sent = signal_in_guest(container, process, signal, all).await;
        let has_failed = |error: &TaskError| error.code() != ErrorCode::NotFound;
        if signal == SIGKILL && !sent.as_ref().is_err_and(has_failed) {
            // Follow the kill also if the guest does not find the process: its exit may wait for other processes that
            // are blocked.
            self.follow_kill(container, if all { &container.init } else { process });
        }
        sent
    }

    /// Pids: the processes of a container, at least its first one.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<ListedProcess>, TaskError> {
        let container = self.container(id)?;
        let init = ListedProcess {
            pid: container.init.pid(),
            exec: None,
        };
        let has_processes = !container.is_sandbox() && container.virtual_machine.is_none();
        if !has_processes || container.init.lifecycle.phase().exit().is_some() {
            return Ok(vec![init]);
        }
        let machine = container.pod.machine();
        let request = Request::Processes {
            container: container.id.to_string(),
        };
        let response = machine.agent().request(request);
        match tokio::time::timeout(PIDS_LIMIT, response).await {
            Ok(Ok(Response::Processes(entries))) if !entries.is_empty() => Ok(with_host_pids(&container, entries)),
            _ => Ok(vec![init]),
        }
    }

    /// Pause: freezes a container's processes.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        match container.init.lifecycle.phase() {
            Phase::Running => {}
            phase => return Err(wrong_phase("pause", phase)),
        }
        let request = Request::Pause {
            container: guest_id(&container, "paused")?,
        };
        run_in_guest(&container.pod, REQUEST_LIMIT, request).await?;
        self.events.publish(
            id,
            TaskPaused {
                container_id: id.to_owned(),
                ..TaskPaused::default()
            },
        );
        container.init.lifecycle.mark_paused();
        Ok(())
    }

    /// Resume: thaws a container's processes.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        match container.init.lifecycle.phase() {
            Phase::Paused => {}
            phase => return Err(wrong_phase("resume", phase)),
        }
        let request = Request::Resume {
            container: guest_id(&container, "resumed")?,
        };
        run_in_guest(&container.pod, REQUEST_LIMIT, request).await?;
        self.events.publish(
            id,
            TaskResumed {
                container_id: id.to_owned(),
                ..TaskResumed::default()
            },
        );
        container.init.lifecycle.mark_resumed();
        Ok(())
    }

    /// ResizePty: sets the size of a terminal in cells, or the size with which it will be created. No-op for a
    /// process without a terminal and for one that has ended.
    pub(crate) async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Result<(), TaskError> {
        let (container, process) = self.process(id, exec)?;
        let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
        let (width, height) = (cells(width), cells(height));
        let phase = process.lifecycle.phase();
        if !process.stdio_spec.terminal || phase.exit().is_some() {
            return Ok(());
        }
        if process.is_unstarted_exec() {
            process.set_terminal_size((width, height));
            return Ok(());
        }
        if container.virtual_machine.is_some() {
            return match process.agent() {
                Some(agent) => resize_exec_by_agent(&container, &process, agent, (width, height)).await,
                // A serial console has no size.
                None => Ok(()),
            };
        }
        let request = Request::Resize {
            container: guest_id(&container, "resized")?,
            exec: process.exec.clone(),
            width,
            height,
        };
        match run_in_guest(&container.pod, REQUEST_LIMIT, request).await {
            // The process ended meanwhile.
            Err(error) if error.code() == ErrorCode::NotFound => Ok(()),
            response => response,
        }
    }

    /// CloseIO: closes a process's standard input.
    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<(), TaskError> {
        let (_, process) = self.process(id, exec)?;
        process.close_stdin();
        Ok(())
    }

    /// Update: changes a container's limits. `resources` is an OCI `LinuxResources` as JSON.
    pub(crate) async fn update(self: &Arc<Self>, id: &str, resources: Vec<u8>) -> Result<(), TaskError> {
        let container = self.container(id)?;
        if container.is_sandbox() {
            // The limits of a pod are the sum of its containers' limits.
            return Ok(());
        }
        let _lock = container.update_lock.lock().await;
        let before = container.limits();
        let after = before.with_update(&resources);
        if let Some(machine) = &container.virtual_machine {
            // Other limits, such as CPU time, hold by the pod's control group on the host, which the kubelet changes.
            if after != before {
                set_limits_of_virtual_machine(&container.id, machine, before, after).await?;
                container.set_limits(after);
            }
            return Ok(());
        }
        // The machine grows before the limits in the guest do, and shrinks after them.
        container.set_limits(before.max(after));
        let request = Request::Update {
            container: container.id.to_string(),
            resources,
        };
        let updated = async {
            self.resize_to_limits(&container.pod).await?;
            run_in_guest(&container.pod, REQUEST_LIMIT, request).await
        };
        let updated = updated.await;
        container.set_limits(if updated.is_ok() { after } else { before });
        if after != before {
            self.resize_in_background(&container.pod);
        }
        updated
    }

    /// Stats: a container's resource use. Empty for a sandbox.
    pub(crate) async fn stats(&self, id: &str) -> Result<ContainerStats, TaskError> {
        let container = self.container(id)?;
        if container.is_sandbox() {
            return Ok(ContainerStats::default());
        }
        if let Some(machine) = &container.virtual_machine {
            return virtual_machine_stats(&container, machine);
        }
        let request = Request::Stats {
            container: container.id.to_string(),
        };
        let (machine, action) = (container.pod.machine(), describe_request(&request));
        let response = machine.agent().ask(request, |response| match response {
            Response::Stats(stats) => Some(*stats),
            _ => None,
        });
        call_agent(&container.pod, STATS_LIMIT, &action, response).await
    }
}

/// Makes the guest send a signal to a process of a container, or to all of its processes. If the guest does not send
/// SIGKILL in time, its machine is killed.
pub(super) async fn signal_in_guest(
    container: &Container,
    process: &Process,
    signal: u32,
    all: bool,
) -> Result<(), TaskError> {
    let machine = container.pod.machine();
    let request = Request::Signal {
        container: container.id.to_string(),
        exec: process.exec.clone(),
        signal,
        all,
    };
    let action = describe_request(&request);
    match tokio::time::timeout(KILL_LIMIT, machine.agent().run(request))
        .await
        .ok()
    {
        // The guest hangs. The end of its machine ends the process.
        None if signal == SIGKILL => {
            let of = process
                .exec
                .as_ref()
                .map_or(String::new(), |exec| format!("exec {exec} of "));
            machine.kill(&format!(
                "the guest did not kill {of}container {} within {} s",
                container.id,
                KILL_LIMIT.as_secs()
            ));
            machine.ended().await;
            Ok(())
        }
        Some(Err(AgentError::Gone)) => {
            machine.ended().await;
            Err(already_finished())
        }
        response => check_response(KILL_LIMIT, &action, response),
    }
}

/// One more than the largest pid that any kernel of 64 bits assigns (kernel, `PID_MAX_LIMIT`).
const PID_LIMIT: u32 = 4 << 20;

/// Replaces guest pids with host pids for the processes that containerd started. Other processes have no pid on the
/// host: theirs become numbers that no process of the host can have, because clients such as `docker top` look for the
/// processes on the host.
fn with_host_pids(container: &Container, entries: Vec<ProcessEntry>) -> Vec<ListedProcess> {
    entries
        .into_iter()
        .map(|entry| {
            let exec = entry.exec.filter(|exec| container.execs().contains_key(exec));
            let started = match &exec {
                Some(exec) => container.process(exec).ok(),
                None if entry.pid == container.init.guest_pid() => Some(container.init.clone()),
                None => None,
            };
            ListedProcess {
                pid: started.map_or(PID_LIMIT + entry.pid % PID_LIMIT, |process| process.pid()),
                exec,
            }
        })
        .collect()
}

fn wrong_phase(action: &str, phase: Phase) -> TaskError {
    TaskError::new(
        ErrorCode::FailedPrecondition,
        format!("cannot {action} a {} container", phase.name()),
    )
}

/// The container's id for a request to the agent. Fails for a sandbox, which has no process in the guest, and for a
/// virtual machine with a user's kernel. `participle` is the action in the error text.
fn guest_id(container: &Container, participle: &str) -> Result<String, TaskError> {
    if container.is_sandbox() {
        let text = format!("a sandbox has no process in the virtual machine that could be {participle}");
        return Err(TaskError::new(ErrorCode::Unimplemented, text));
    }
    if container.virtual_machine.is_some() {
        let text = format!("a virtual machine with a user's kernel cannot be {participle}");
        return Err(TaskError::new(ErrorCode::Unimplemented, text));
    }
    Ok(container.id.to_string())
}
