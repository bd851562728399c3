//! Unsolicited events: a process exits, the guest runs out of memory, a machine ends, a pid holder is killed.

use std::{sync::Arc, time::Duration};

use containerd_shim::protos::{
    events::task::{TaskExit, TaskOOM},
    protobuf::MessageField,
};
use nutshell_protocol::{Event, Exited};

use super::{
    container::{
        Container, Role,
        lifecycle::{Exit, SIGKILL_STATUS},
        process::Process,
    },
    limits::DRAIN_LIMIT,
    table::Tasks,
};
use crate::shim::{pod::Pod, record::ExitRecord};

impl Tasks {
    /// Handles an event of the agent of a pod. Does not block. It spawns at most one task for each process that
    /// containerd started, no matter how many events the agent sends.
    pub(super) fn on_event(self: &Arc<Self>, pod: u64, event: Event) {
        match event {
            Event::OutOfMemory { container } => {
                let known = self.container_in_pod(pod, &container);
                let known = known.filter(|known| known.is_in_guest());
                if let Some(known) = known.filter(|known| known.should_announce_out_of_memory()) {
                    self.events.publish(
                        known.id.as_ref(),
                        TaskOOM {
                            container_id: container,
                            ..TaskOOM::default()
                        },
                    );
                }
            }
            Event::Exited(exited) => {
                let process = self.container_in_pod(pod, &exited.container).and_then(|container| {
                    let process = container.process(exited.exec.as_deref().unwrap_or_default()).ok()?;
                    // The agent in a virtual machine runs execs. The QEMU guest agent reports no events.
                    let is_run_by_agent = container.is_in_guest() || process.agent().is_some();
                    is_run_by_agent.then_some((container, process))
                });
                match process {
                    // A process that was not started cannot exit, and no process exits twice.
                    Some((container, process)) if !process.is_unstarted_exec() && process.try_claim_exit() => {
                        let tasks = self.clone();
                        tokio::spawn(async move { tasks.on_exit(&container, &process, &exited).await });
                    }
                    _ => log::debug!("ignored an exit of {} {:?}", exited.container, exited.exec),
                }
            }
        }
    }

    /// Records an exit that the agent reported. First waits for delivery of the output that the process had written.
    async fn on_exit(&self, container: &Container, process: &Process, exited: &Exited) {
        let exit = Exit::now(exited.status.into());
        log::debug!(
            "task {} {:?}: exited with status {} after writing {} bytes to stdout and {} to stderr",
            exited.container,
            exited.exec,
            exit.status,
            exited.stdout_bytes,
            exited.stderr_bytes
        );
        if let Some(streams) = process.streams() {
            let machine = container.pod.machine();
            streams
                .drained(&machine, exited.stdout_bytes, exited.stderr_bytes, DRAIN_LIMIT)
                .await;
        }
        if process.exec.is_none() {
            self.end_execs(container).await;
        }
        self.record_exit(container, process, exit).await;
    }

    /// Waits until the exits of all execs are recorded, because they must precede that of the first process. All execs
    /// have ended or were given up before. One whose exit is not recorded in time is recorded as killed.
    pub(super) async fn end_execs(&self, container: &Container) {
        for exec in container.all_execs() {
            if !exec.is_unstarted_exec() {
                let recorded = tokio::time::timeout(DRAIN_LIMIT, exec.lifecycle.wait_exit()).await;
                if recorded.is_err() {
                    self.record_exit(container, &exec, Exit::now(SIGKILL_STATUS)).await;
                }
            }
        }
    }

    /// Records and announces an exit.
    pub(super) async fn record_exit(&self, container: &Container, process: &Process, exit: Exit) {
        process
            .lifecycle
            .record_exit(exit, || {
                if process.exec.is_none() {
                    store_exit(container, exit);
                }
                if !container.is_task() {
                    return;
                }
                self.events.publish(
                    container.id.as_ref(),
                    TaskExit {
                        container_id: container.id.to_string(),
                        id: process.exec.clone().unwrap_or_else(|| container.id.to_string()),
                        pid: process.pid(),
                        exit_status: exit.status,
                        exited_at: MessageField::some(exit.at.into()),
                        ..TaskExit::default()
                    },
                );
            })
            .await;
    }

    /// Ends all processes of a pod when its machine ends.
    pub(super) fn watch_machine(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (tasks, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            let machine = pod.machine();
            let ending = machine.ended().await;
            if !Arc::ptr_eq(&machine, &pod.machine()) {
                // A virtual machine has replaced it, and is watched by its task.
                return;
            }
            let containers = tasks.tasks_of_pod(pod.number());
            if containers
                .iter()
                .any(|container| container.init.lifecycle.phase().exit().is_none())
            {
                let text = format!("the virtual machine of {} ended: {ending}", join_ids(&containers));
                if machine.was_stopped() {
                    log::debug!("{text}");
                } else {
                    log::error!("{text}");
                }
            }
            for container in containers {
                let tasks = tasks.clone();
                tokio::spawn(async move { tasks.record_killed_exits(&container).await });
            }
        });
    }

    /// Records that the processes of a container were killed: its machine has ended, or the processes cannot end. Exits
    /// that the agent reported before are kept.
    pub(super) async fn record_killed_exits(&self, container: &Container) {
        for exec in container.all_execs() {
            if !exec.is_unstarted_exec() && exec.try_claim_exit() {
                self.record_exit(container, &exec, Exit::now(SIGKILL_STATUS)).await;
            }
        }
        if container.init.try_claim_exit() {
            self.end_execs(container).await;
            if container.is_sandbox() {
                container.pod.disconnect_network().await;
            }
            self.record_exit(container, &container.init, Exit::now(SIGKILL_STATUS))
                .await;
        }
    }

    /// Passes a signal that kills a process's pid holder on to the process.
    pub(super) fn watch_pid_holder(self: &Arc<Self>, container: &Arc<Container>, process: &Arc<Process>) {
        let Some(holder) = process.pid_holder() else { return };
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move {
            let Some(signal) = holder.signalled().await else {
                return;
            };
            log::info!(
                "task {}: its host pid {} received signal {signal}; forwarding it to the process in the guest",
                container.id,
                holder.pid()
            );
            // The process may have ended meanwhile.
            if let Err(error) = tasks.kill_process(&container, &process, signal, false).await {
                log::info!("task {}: cannot forward signal {signal}: {error}", container.id);
            }
        });
    }

    /// Ends a sandbox: first its machine with all processes in it, then the sandbox itself, with `status`. The guest
    /// has `limit` to write its disks back.
    pub(super) async fn end_sandbox(&self, container: &Container, status: u32, limit: Duration) {
        if !container.init.try_claim_exit() {
            container.init.lifecycle.wait_exit().await;
            return;
        }
        let tasks = self.tasks_of_pod(container.pod.number());
        let writes = |task: &Arc<Container>| task.role == Role::Member { writes_disk: true };
        if tasks.iter().any(writes) {
            container.write_back_disks(limit).await;
        }
        container.pod.machine().log_console().await;
        container.pod.stop_machine("its sandbox was stopped").ended().await;
        for member in tasks.iter().filter(|task| !task.is_sandbox()) {
            member.init.lifecycle.wait_exit().await;
        }
        // Before the exit is announced, because CNI removes the network namespace after that.
        container.pod.disconnect_network().await;
        self.record_exit(container, &container.init, Exit::now(status)).await;
    }
}

/// Stores the exit in the bundle, for the `delete` action in case the shim dies before containerd has the event.
fn store_exit(container: &Container, exit: Exit) {
    let record = ExitRecord::new(container.init.pid(), exit.status, exit.at);
    if let Err(error) = record.store(&container.bundle) {
        log::warn!("task {}: cannot store its exit in the bundle: {error}", container.id);
    }
}

fn join_ids(containers: &[Arc<Container>]) -> String {
    let ids: Vec<_> = containers.iter().map(|container| container.id.as_str()).collect();
    ids.join(", ")
}
