//! Delete: frees the resources on this host of a process that has ended.

use std::{sync::Arc, time::Duration};

use containerd_shim::protos::{events::task::TaskDelete, protobuf::MessageField};
use nutshell_protocol::Request;

use super::{
    agent_call::run_in_guest,
    container::{
        Container, Role,
        hooks::{self, HookContainer},
        lifecycle::{Deletion, Exit, Phase},
        process::Process,
        signal::SIGKILL,
    },
    limits::{DELETE_LIMIT, DRAIN_LIMIT, EXIT_LIMIT, WRITE_BACK_LIMIT},
    table::Tasks,
};
use crate::{
    oci::ContainerId,
    shim::{
        error::{ErrorCode, TaskError},
        pod::Pod,
    },
};

/// The response to Delete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deleted {
    /// The pid that the process had on this host.
    pub(crate) pid: u32,
    pub(crate) exit: Exit,
}

impl Tasks {
    /// Deletes the container `id`, or its exec `exec` if that is not empty.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<Deleted, TaskError> {
        let (container, process) = self.process(id, exec)?;
        let pid = process.pid();
        log::debug!("task {id} {exec}: delete");
        if process.lifecycle.phase() == Phase::Created {
            self.end_unstarted(&container, &process).await?;
        }
        let exit = match process.lifecycle.begin_deletion()? {
            Deletion::Begun(exit) => exit,
            // A client repeats a call that timed out.
            Deletion::InProgress => {
                let exit = process.lifecycle.wait_deleted().await;
                return Ok(Deleted { pid, exit });
            }
        };
        if exec.is_empty() {
            self.free_resources(&container).await;
            self.events.publish(
                id,
                TaskDelete {
                    container_id: id.to_owned(),
                    pid,
                    exit_status: exit.status,
                    exited_at: MessageField::some(exit.at.into()),
                    ..TaskDelete::default()
                },
            );
            self.remove(&container.id);
            self.resize_without(&container);
        } else {
            finish_streams(&container, &process).await;
            process.release_pid();
            // An exec that was not started, or whose start failed, has streams that were never used.
            process.stdio_spec.close_unused(self.streaming());
            container.execs().remove(exec);
        }
        process.lifecycle.mark_deleted();
        log::debug!("task {id} {exec}: deleted");
        Ok(Deleted { pid, exit })
    }

    /// Ends a process that was never started: a container is killed, an exec is marked as ended.
    async fn end_unstarted(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<(), TaskError> {
        if process.exec.is_some() {
            // The exec never ran, so there is no exit to announce.
            process.lifecycle.record_exit(Exit::now(0), || {}).await;
            return Ok(());
        }
        match self.kill_process(container, process, SIGKILL, true).await {
            Err(error) if error.code() != ErrorCode::NotFound => return Err(error),
            _ => {}
        }
        let exit = tokio::time::timeout(EXIT_LIMIT, process.lifecycle.wait_exit());
        if exit.await.is_err() {
            container.pod.machine().kill(&format!(
                "the guest did not report the end of container {}, which was killed",
                container.id
            ));
            process.lifecycle.wait_exit().await;
        }
        Ok(())
    }

    /// Frees everything that a container holds on this host and in the guest, and runs its poststop hooks.
    pub(super) async fn free_resources(&self, container: &Container) {
        if !container.is_sandbox() {
            finish_streams(container, &container.init).await;
        }
        if let Some(machine) = &container.virtual_machine {
            container.pod.machine().ended().await;
            machine.release(&container.id, DRAIN_LIMIT).await;
        }
        for exec in container.all_execs() {
            exec.release_pid();
        }
        container.init.release_pid();
        match container.role {
            Role::Single { writes_disk } => {
                if writes_disk {
                    container.write_back_disks(WRITE_BACK_LIMIT).await;
                }
                container.pod.end().await;
            }
            Role::Sandbox(_) => container.pod.end().await,
            // Its guest has ended with its machine, and had no container to delete.
            Role::Member { .. } if container.virtual_machine.is_some() => container.pod.end_file_server().await,
            Role::Member { .. } => {
                delete_from_guest(container).await;
                container.pod.detach(&container.id).await;
            }
        }
        let hook_container = HookContainer {
            pid: 0,
            ..container.hook_container()
        };
        hooks::run_all("poststop", &container.hooks.poststop, "stopped", hook_container).await;
    }
}

/// Waits until readers have all output, and closes the streams. A process that still has an output open, such as a
/// grandchild in another pid namespace, loses it.
async fn finish_streams(container: &Container, process: &Process) {
    let Some(streams) = process.streams() else { return };
    let machine = container.pod.machine();
    if !streams.finished(Duration::ZERO).await {
        if process.exec.is_none() {
            delete_from_guest(container).await;
        }
        streams.finished(DRAIN_LIMIT).await;
    }
    process.close_streams(&machine).await;
}

/// Makes the guest kill the remaining processes of a container and delete it. If the container is abandoned, the guest
/// does not wait for processes that cannot end. A second call is a no-op.
pub(super) async fn delete_from_guest(container: &Container) {
    let (pod, id) = (&container.pod, &container.id);
    if container.is_abandoned() {
        let abandon = Request::AbandonContainer {
            container: id.to_string(),
        };
        run_deletion(pod, id, abandon).await;
    } else {
        remove_from_guest(pod, id).await;
    }
}

/// Makes the guest kill the remaining processes of a container and delete it. A second call is a no-op.
pub(super) async fn remove_from_guest(pod: &Pod, id: &ContainerId) {
    let delete = Request::DeleteContainer {
        container: id.to_string(),
    };
    run_deletion(pod, id, delete).await;
}

async fn run_deletion(pod: &Pod, id: &ContainerId, request: Request) {
    match run_in_guest(pod, DELETE_LIMIT, request).await {
        Err(error) if !matches!(error.code(), ErrorCode::NotFound | ErrorCode::FailedPrecondition) => {
            log::warn!("task {id}: cannot remove it from the guest: {error}");
        }
        _ => {}
    }
}
