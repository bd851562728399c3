//! Kill and the other calls about a process that exists.

use std::{process, sync::Arc};

use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use nutshell_protocol::{ContainerStats, ProcessEntry, Request, Response};

use super::{ANSWER_LIMIT, Container, HINT_LIMIT, KILL_LIMIT, Tasks, WRITE_BACK_LIMIT, answered};
use crate::shim::{
    error::{Kind, TaskError},
    machine::AgentError,
    stdio,
    tasks::lifecycle::{Exit, Phase},
    tasks::process::Process,
};

/// SIGKILL.
pub(super) const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// What State answers.
#[derive(Debug)]
pub(crate) struct State {
    /// The container.
    pub(crate) container: Arc<Container>,
    /// The pid on this host, 0 for an exec that was not started.
    pub(crate) pid: u32,
    /// Where it is.
    pub(crate) phase: Phase,
    /// Its standard streams.
    pub(crate) request: stdio::StdioSpec,
}

/// A process as Pids lists it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// For processes that containerd started, the pid on this host; for others that in the guest.
    pub(crate) pid: u32,
    /// The exec as which it was started.
    pub(crate) exec: Option<String>,
}

impl Tasks {
    /// Where a process is. Never waits.
    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<State, TaskError> {
        let (container, process) = self.process(id, exec)?;
        Ok(State {
            pid: process.pid(),
            phase: process.lifecycle.phase(),
            request: process.request.clone(),
            container,
        })
    }

    /// The pids of shim and task; 0 for a task that is not here. Never waits.
    pub(crate) fn connect(&self, id: &str) -> (u32, u32) {
        let task = self.container(id).map_or(0, |container| container.init.pid());
        (process::id(), task)
    }

    /// Waits for the end of a process.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit, TaskError> {
        let (_, process) = self.process(id, exec)?;
        Ok(process.lifecycle.exit().await)
    }

    /// Sends a signal to a process, or to all of its container.
    pub(crate) async fn kill(self: &Arc<Self>, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let (container, process) = self.process(id, exec)?;
        self.kill_process(&container, &process, signal, all).await
    }

    pub(super) async fn kill_process(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let finished = || Err(TaskError::new(Kind::NotFound, "process already finished"));
        if process.lifecycle.phase().exit().is_some() {
            return finished();
        }
        if process.exec.is_some() && process.lifecycle.phase() == Phase::Created {
            return Err(TaskError::new(Kind::FailedPrecondition, "process not started"));
        }
        if container.is_sandbox() {
            // It stands for a program that ends when it is told to, and ignores the rest.
            if ends_a_sandbox(signal) {
                self.end_sandbox(container, 128 + signal, WRITE_BACK_LIMIT).await;
            }
            return Ok(());
        }
        let machine = container.pod.machine();
        let request = Request::Signal {
            container: container.id.to_string(),
            exec: process.exec.clone(),
            signal,
            all,
        };
        match machine.within(KILL_LIMIT, machine.agent().run(request)).await {
            // A guest that does not even kill is of no use any more; its end ends the process.
            None if signal == SIGKILL => {
                machine.kill(&format!(
                    "the guest did not kill a process within {} s",
                    KILL_LIMIT.as_secs()
                ));
                machine.ended().await;
                Ok(())
            }
            Some(Err(AgentError::Gone)) => {
                machine.ended().await;
                finished()
            }
            answer => answered(KILL_LIMIT, answer),
        }
    }

    /// The processes of a container, at least its first one.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<Listed>, TaskError> {
        let container = self.container(id)?;
        let init = Listed {
            pid: container.init.pid(),
            exec: None,
        };
        if container.is_sandbox() || container.init.lifecycle.phase().exit().is_some() {
            return Ok(vec![init]);
        }
        let machine = container.pod.machine();
        let request = Request::Processes {
            container: container.id.to_string(),
        };
        let asked = machine.agent().request(request);
        // containerd takes a task without processes for a leak: a guest that hangs must not have one.
        match tokio::time::timeout(HINT_LIMIT, asked).await {
            Ok(Ok(Response::Processes(entries))) if !entries.is_empty() => Ok(list(&container, entries)),
            _ => Ok(vec![init]),
        }
    }

    /// Freezes a container's processes.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        match container.init.lifecycle.phase() {
            Phase::Running => {}
            phase => return Err(wrong_phase("pause", phase)),
        }
        let request = Request::Pause {
            container: guest_name(&container, "paused")?,
        };
        container
            .ask(ANSWER_LIMIT, container.pod.machine().agent().run(request))
            .await?;
        self.events.publish(&TaskPaused {
            container_id: id.to_owned(),
            ..TaskPaused::default()
        });
        container.init.lifecycle.paused();
        Ok(())
    }

    /// Thaws a container's processes.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        match container.init.lifecycle.phase() {
            Phase::Paused => {}
            phase => return Err(wrong_phase("resume", phase)),
        }
        let request = Request::Resume {
            container: guest_name(&container, "resumed")?,
        };
        container
            .ask(ANSWER_LIMIT, container.pod.machine().agent().run(request))
            .await?;
        self.events.publish(&TaskResumed {
            container_id: id.to_owned(),
            ..TaskResumed::default()
        });
        container.init.lifecycle.resumed();
        Ok(())
    }

    /// Sets a terminal's size, now or for the start to come.
    pub(crate) async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Result<(), TaskError> {
        let (container, process) = self.process(id, exec)?;
        let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
        let (width, height) = (cells(width), cells(height));
        let phase = process.lifecycle.phase();
        if !process.request.terminal || phase.exit().is_some() {
            return Ok(());
        }
        if process.exec.is_some() && phase == Phase::Created {
            process.set_size((width, height));
            return Ok(());
        }
        let request = Request::Resize {
            container: guest_name(&container, "resized")?,
            exec: process.exec.clone(),
            width,
            height,
        };
        match container
            .ask(ANSWER_LIMIT, container.pod.machine().agent().run(request))
            .await
        {
            // It ended meanwhile.
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            answer => answer,
        }
    }

    /// Ends a process's standard input.
    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<(), TaskError> {
        let (_, process) = self.process(id, exec)?;
        process.close_stdin();
        Ok(())
    }

    /// Changes a container's limits: OCI `LinuxResources` as JSON.
    pub(crate) async fn update(self: &Arc<Self>, id: &str, resources: Vec<u8>) -> Result<(), TaskError> {
        let container = self.container(id)?;
        if container.is_sandbox() {
            // Limits of a pod are the sum of its containers'.
            return Ok(());
        }
        let _one = container.updating.lock().await;
        let before = container.limits();
        let after = before.with_update(&resources);
        // What grows must be there first, and what shrinks must be out of use.
        container.set_limits(before.max(after));
        let request = Request::Update {
            container: container.id.to_string(),
            resources,
        };
        let updated = async {
            self.fit(&container.pod).await?;
            container
                .ask(ANSWER_LIMIT, container.pod.machine().agent().run(request))
                .await
        };
        let updated = updated.await;
        container.set_limits(if updated.is_ok() { after } else { before });
        if after != before {
            self.fit_later(&container.pod);
        }
        updated
    }

    /// A container's resource use.
    pub(crate) async fn stats(&self, id: &str) -> Result<ContainerStats, TaskError> {
        let container = self.container(id)?;
        if container.is_sandbox() {
            return Ok(ContainerStats::default());
        }
        let request = Request::Stats {
            container: container.id.to_string(),
        };
        let answer = async {
            match container.pod.machine().agent().request(request).await? {
                Response::Stats(stats) => Ok(*stats),
                _ => Err(AgentError::Unexpected),
            }
        };
        container.ask(ANSWER_LIMIT, answer).await
    }
}

fn list(container: &Container, entries: Vec<ProcessEntry>) -> Vec<Listed> {
    entries
        .into_iter()
        .map(|entry| {
            let exec = entry.exec.filter(|exec| container.execs().contains_key(exec));
            let started = match &exec {
                Some(exec) => container.process(exec).ok(),
                None if entry.pid == container.init.guest_pid() => Some(container.init.clone()),
                None => None,
            };
            Listed {
                pid: started.map_or(entry.pid, |process| process.pid()),
                exec,
            }
        })
        .collect()
}

fn ends_a_sandbox(signal: u32) -> bool {
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGKILL, libc::SIGTERM]
        .iter()
        .any(|ending| ending.unsigned_abs() == signal)
}

fn wrong_phase(action: &str, phase: Phase) -> TaskError {
    TaskError::new(
        Kind::FailedPrecondition,
        format!("cannot {action} a {} container", phase.name()),
    )
}

fn guest_name(container: &Container, done: &str) -> Result<String, TaskError> {
    if container.is_sandbox() {
        let text = format!("a sandbox has no process in the virtual machine that could be {done}");
        return Err(TaskError::new(Kind::Unimplemented, text));
    }
    Ok(container.id.to_string())
}
