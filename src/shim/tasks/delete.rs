//! Delete: forget a process that has ended, with everything that it has on this host.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{events::task::TaskDelete, protobuf::MessageField};
use nutshell_protocol::Request;

use super::{ANSWER_LIMIT, Container, DRAIN_LIMIT, Role, Tasks, WRITE_BACK_LIMIT};
use crate::shim::{
    error::{Kind, TaskError},
    events::to_timestamp,
    tasks::hooks::{self, Subject},
    tasks::lifecycle::{Deletion, Exit, Phase},
    tasks::process::Process,
};

/// What is left of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deleted {
    /// The pid that it had on this host.
    pub(crate) pid: u32,
    /// How it ended.
    pub(crate) exit: Exit,
}

impl Tasks {
    /// Deletes the container `id`, or its exec `exec`.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<Deleted, TaskError> {
        let (container, process) = self.process(id, exec)?;
        let pid = process.pid();
        log::debug!("task {id} {exec}: delete");
        if process.lifecycle.phase() == Phase::Created {
            self.end_unstarted(&container, &process).await?;
        }
        let exit = match process.lifecycle.begin_deletion()? {
            Deletion::Begun(exit) => exit,
            // The same call again, because its client gave up waiting.
            Deletion::UnderWay => {
                let exit = process.lifecycle.deletion().await;
                return Ok(Deleted { pid, exit });
            }
        };
        if exec.is_empty() {
            self.forget(&container).await;
            self.events.publish(&TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(to_timestamp(exit.at)),
                ..TaskDelete::default()
            });
            {
                let mut table = self.table();
                table.containers.remove(&container.id);
                table.taken.remove(&container.id);
            }
            self.fit_without(&container);
        } else {
            finish_streams(&container, &process).await;
            process.release();
            container.execs().remove(exec);
        }
        process.lifecycle.deleted();
        log::debug!("task {id} {exec}: deleted");
        Ok(Deleted { pid, exit })
    }

    /// A container that was never started is killed; an exec that was never started is just dropped.
    async fn end_unstarted(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<(), TaskError> {
        if process.exec.is_some() {
            // Nobody can have seen it run: nothing is announced.
            process.lifecycle.exited(Exit::now(0), || {}).await;
            return Ok(());
        }
        match self
            .kill_process(container, process, super::control::SIGKILL, true)
            .await
        {
            Err(error) if error.kind() != Kind::NotFound => return Err(error),
            _ => {}
        }
        let ended = tokio::time::timeout(DRAIN_LIMIT, process.lifecycle.exit());
        if ended.await.is_err() {
            container
                .pod
                .machine()
                .kill("the guest did not report the end of a container that was killed");
            process.lifecycle.exit().await;
        }
        Ok(())
    }

    /// Takes back everything that a container has on this host.
    pub(super) async fn forget(&self, container: &Container) {
        if !container.is_sandbox() {
            finish_streams(container, &container.init).await;
        }
        for exec in container.all_execs() {
            exec.release();
        }
        container.init.release();
        match container.role {
            Role::Alone { writes_disk } => {
                if writes_disk {
                    write_back(container, WRITE_BACK_LIMIT).await;
                }
                container.pod.end().await;
            }
            Role::Sandbox(_) => container.pod.end().await,
            Role::Member { .. } => {
                remove_from_guest(container).await;
                container.pod.detach(&container.id).await;
            }
        }
        let subject = Subject {
            pid: 0,
            ..container.subject()
        };
        hooks::run_all("poststop", &container.hooks.poststop, "stopped", subject).await;
    }
}

/// Waits until readers have all output, and closes the streams. Whoever still holds an output open
/// (a grandchild in a pid namespace of its own) has had its time then.
async fn finish_streams(container: &Container, process: &Process) {
    let Some(streams) = process.streams() else { return };
    let machine = container.pod.machine();
    if !streams.finished(Duration::ZERO).await {
        if process.exec.is_none() {
            remove_from_guest(container).await;
        }
        streams.finished(DRAIN_LIMIT).await;
    }
    process.close_streams(machine).await;
}

/// Has the guest kill what is left of a container and forget it. Once it is forgotten, a second call
/// changes nothing.
async fn remove_from_guest(container: &Container) {
    let delete = Request::DeleteContainer {
        container: container.id.to_string(),
    };
    let machine = container.pod.machine();
    match container.ask(ANSWER_LIMIT, machine.agent().run(delete)).await {
        Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::FailedPrecondition) => {
            log::warn!("task {}: remove it from the guest: {error}", container.id);
        }
        _ => {}
    }
}

/// Has the guest end all containers and write its disks back.
pub(super) async fn write_back(container: &Container, limit: Duration) {
    let machine = container.pod.machine();
    if let Err(error) = container.ask(limit, machine.agent().run(Request::Shutdown)).await {
        log::error!("task {}: its disk may lack the last writes: {error}", container.id);
    }
}
