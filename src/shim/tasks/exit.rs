//! What happens by itself: processes end, the guest runs out of memory, a machine ends, somebody
//! kills a holder.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    protobuf::MessageField,
};
use nutshell_protocol::{Event, Exited};

use super::{Container, DRAIN_LIMIT, KILLED, Role, Tasks, delete::write_back};
use crate::shim::{
    events::to_timestamp,
    pod::Pod,
    record,
    tasks::lifecycle::{Exit, Phase},
    tasks::process::Process,
};

impl Tasks {
    /// Takes an event of the agent of a pod. Does not block; what it starts is bounded by the number
    /// of processes that containerd started.
    pub(super) fn on_event(self: &Arc<Self>, pod: u64, event: Event) {
        match event {
            Event::OutOfMemory { container } => {
                if self.of_pod(pod, &container).is_some() {
                    self.events.publish(&TaskOOM {
                        container_id: container,
                        ..TaskOOM::default()
                    });
                }
            }
            Event::Exited(exited) => {
                let process = self.of_pod(pod, &exited.container).and_then(|container| {
                    let process = container.process(exited.exec.as_deref().unwrap_or_default()).ok()?;
                    Some((container, process))
                });
                match process {
                    // One that was not begun to start cannot have ended, and none ends twice.
                    Some((container, process)) if !is_waiting_exec(&process) && process.report_end() => {
                        let tasks = self.clone();
                        tokio::spawn(async move { tasks.ended(&container, &process, &exited).await });
                    }
                    _ => log::debug!("ignored an exit of {} {:?}", exited.container, exited.exec),
                }
            }
        }
    }

    /// The container if it belongs to the pod: an agent has no say in others.
    fn of_pod(&self, pod: u64, id: &str) -> Option<Arc<Container>> {
        let id = id.parse().ok()?;
        let container = self.table().containers.get(&id).cloned()?;
        (container.pod.number() == pod).then_some(container)
    }

    /// A process ended and said how much it had written: its end is known when that was delivered.
    async fn ended(&self, container: &Container, process: &Process, exited: &Exited) {
        let exit = Exit::now(exited.status.into());
        log::debug!(
            "task {} {:?}: ended with {} after {} and {} bytes",
            exited.container,
            exited.exec,
            exit.status,
            exited.stdout_bytes,
            exited.stderr_bytes
        );
        if let Some(streams) = process.streams() {
            let machine = container.pod.machine();
            streams
                .drained(machine, exited.stdout_bytes, exited.stderr_bytes, DRAIN_LIMIT)
                .await;
        }
        if process.exec.is_none() {
            self.end_execs(container).await;
        }
        self.record(container, process, exit).await;
    }

    /// The execs of a container end before its first process. The agent has said so of each, and
    /// each had its time for its output; whoever is not recorded then is recorded as killed.
    async fn end_execs(&self, container: &Container) {
        for exec in container.all_execs() {
            if !is_waiting_exec(&exec) {
                let recorded = tokio::time::timeout(DRAIN_LIMIT, exec.lifecycle.exit()).await;
                if recorded.is_err() {
                    self.record(container, &exec, Exit::now(KILLED)).await;
                }
            }
        }
    }

    /// Records and announces an exit.
    pub(super) async fn record(&self, container: &Container, process: &Process, exit: Exit) {
        process
            .lifecycle
            .exited(exit, || {
                if process.exec.is_none() {
                    remember(container, exit);
                }
                if !container.is_task() {
                    return;
                }
                self.events.publish(&TaskExit {
                    container_id: container.id.to_string(),
                    id: process.exec.clone().unwrap_or_else(|| container.id.to_string()),
                    pid: process.pid(),
                    exit_status: exit.status,
                    exited_at: MessageField::some(to_timestamp(exit.at)),
                    ..TaskExit::default()
                });
            })
            .await;
    }

    /// When the machine ends, so does every process in it that has not ended before.
    pub(super) fn follow_machine(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (tasks, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            let ending = pod.machine().ended().await;
            let members = tasks.members(pod.number());
            if members
                .iter()
                .any(|container| container.init.lifecycle.phase().exit().is_none())
            {
                let text = format!("the virtual machine of {} ended: {ending}", names(&members));
                if pod.machine().was_stopped() {
                    log::debug!("{text}");
                } else {
                    log::error!("{text}");
                }
            }
            for container in members {
                let tasks = tasks.clone();
                tokio::spawn(async move { tasks.lost(&container).await });
            }
        });
    }

    /// Ends the processes of a container whose machine is gone, but for those whose end is known.
    async fn lost(&self, container: &Container) {
        for exec in container.all_execs() {
            if !is_waiting_exec(&exec) && exec.report_end() {
                self.record(container, &exec, Exit::now(KILLED)).await;
            }
        }
        if container.init.report_end() {
            self.end_execs(container).await;
            if container.is_sandbox() {
                container.pod.disconnect_network().await;
            }
            self.record(container, &container.init, Exit::now(KILLED)).await;
        }
    }

    /// A signal that kills a holder is meant for the process that it stands for.
    pub(super) fn follow_holder(self: &Arc<Self>, container: &Arc<Container>, process: &Arc<Process>) {
        let Some(holder) = process.holder() else { return };
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move {
            let Some(signal) = holder.signalled().await else {
                return;
            };
            log::info!(
                "task {}: somebody sent signal {signal} to pid {}, which stands for it",
                container.id,
                holder.pid()
            );
            // It may have ended meanwhile.
            if let Err(error) = tasks.kill_process(&container, &process, signal, false).await {
                log::info!("task {}: {error}", container.id);
            }
        });
    }

    /// Ends a sandbox: its machine first, with all that is left in it. The guest has `limit` to write its
    /// disks back.
    pub(super) async fn end_sandbox(&self, container: &Container, status: u32, limit: Duration) {
        if !container.init.report_end() {
            container.init.lifecycle.exit().await;
            return;
        }
        let members = self.members(container.pod.number());
        let writes = |member: &Arc<Container>| member.role == Role::Member { writes_disk: true };
        if members.iter().any(writes) {
            write_back(container, limit).await;
        }
        container.pod.machine().log_console().await;
        container.pod.machine().stop("its sandbox was stopped");
        container.pod.machine().ended().await;
        for member in members.iter().filter(|member| !member.is_sandbox()) {
            member.init.lifecycle.exit().await;
        }
        // CNI takes the namespace down when it hears of the end.
        container.pod.disconnect_network().await;
        self.record(container, &container.init, Exit::now(status)).await;
    }
}

/// An exec that was added and not started: nothing of it can end.
fn is_waiting_exec(process: &Process) -> bool {
    process.exec.is_some() && process.lifecycle.phase() == Phase::Created
}

/// For `delete`, should the shim die before containerd has heard of the exit.
fn remember(container: &Container, exit: Exit) {
    let exit = record::Exit::new(container.init.pid(), exit.status, exit.at);
    if let Err(error) = exit.store(&container.bundle) {
        log::warn!("task {}: {error}", container.id);
    }
}

fn names(containers: &[Arc<Container>]) -> String {
    let names: Vec<_> = containers.iter().map(|container| container.id.as_str()).collect();
    names.join(", ")
}
