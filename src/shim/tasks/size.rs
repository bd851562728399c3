//! Resizes a pod's machine when the limits of its containers change.

use std::sync::Arc;

use nutshell_protocol::Request;

use super::{
    agent_call::{machine_ended, run_in_guest},
    container::{Container, Role},
    limits::{PLUG_LIMIT, REQUEST_LIMIT},
    table::Tasks,
};
use crate::{
    oci::{Limits, Size},
    shim::{
        error::{ErrorCode, TaskError},
        machine::VmmError,
        pod::Pod,
    },
};

impl Tasks {
    /// Resizes the machine of `pod` to the sum of its containers' limits. Additional memory and vCPUs are usable
    /// when this returns. Excess memory is removed later, when the guest has freed it.
    ///
    /// # Errors
    ///
    /// The machine cannot grow. It keeps its size.
    pub(super) async fn resize_to_limits(&self, pod: &Pod) -> Result<(), TaskError> {
        let change = |from: Size, to: Size| async move {
            let action = format!(
                "change the virtual machine from {} MiB and {} vCPUs to {} MiB and {}",
                from.memory >> 20,
                from.vcpus,
                to.memory >> 20,
                to.vcpus
            );
            log::debug!("{action}");
            let resized = resize(pod, from, to).await;
            if resized.is_err() {
                // A slow guest could complete the change later, and then have more than the size that the pod has
                // recorded.
                if let Err(error) = request_size(pod, to, from).await {
                    log::info!("cannot undo a failed resize ({action}): {error}");
                }
            }
            resized.map_err(|error| error.during(&action))
        };
        pod.resize(|| self.wanted_size(pod), change).await
    }

    /// [`Self::resize_to_limits`] in the background, for when a container needs less than before.
    pub(super) fn resize_in_background(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (tasks, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = tasks.resize_to_limits(&pod).await {
                log::info!("cannot {error}");
            }
        });
    }

    /// [`Self::resize_in_background`] after `container` was removed from the table. No-op unless it shared its pod.
    pub(super) fn resize_without(self: &Arc<Self>, container: &Container) {
        if matches!(container.role, Role::Member { .. }) && container.virtual_machine.is_none() {
            self.resize_in_background(&container.pod);
        }
    }

    /// The size for all containers of a pod that have not ended.
    fn wanted_size(&self, pod: &Pod) -> Size {
        let tasks = self.tasks_of_pod(pod.number());
        let present = tasks.iter().filter(|task| task.init.lifecycle.phase().exit().is_none());
        let limits = Limits::sum(present.map(|task| task.limits()));
        pod.size().size_for(limits, pod.memory_limit())
    }
}

/// Changes the size, and waits until the guest's kernel has added any new memory.
async fn resize(pod: &Pod, from: Size, to: Size) -> Result<(), TaskError> {
    request_size(pod, from, to).await?;
    if to.memory <= from.memory {
        return Ok(());
    }
    let machine = pod.machine();
    tokio::time::timeout(PLUG_LIMIT, machine.memory_plugged(hotplugged_memory(pod, to)))
        .await
        .map_err(|_| {
            let text = format!(
                "the guest's kernel did not add the new memory within {} s",
                PLUG_LIMIT.as_secs()
            );
            TaskError::unknown(text)
        })
}

/// Offers the guest additional memory and vCPUs, and requests the return of excess ones.
async fn request_size(pod: &Pod, from: Size, to: Size) -> Result<(), TaskError> {
    let machine = pod.machine();
    match machine.resize(hotplugged_memory(pod, to), to.vcpus).await {
        Ok(()) => {}
        Err(VmmError::Refused(reason)) => return Err(TaskError::unknown(reason)),
        Err(error @ (VmmError::Timeout(_) | VmmError::NotStarted)) => {
            return Err(TaskError::new(ErrorCode::Unavailable, error.to_string()));
        }
        Err(VmmError::Channel(error)) => return Err(machine_ended(pod, &error).await),
    }
    let request = Request::ResizeMachine {
        vcpus: to.vcpus.into(),
        has_memory_device: hotplugged_memory(pod, from).max(hotplugged_memory(pod, to)) > 0,
    };
    run_in_guest(pod, REQUEST_LIMIT, request).await
}

/// The memory of a size beyond what the machine booted with, in bytes.
fn hotplugged_memory(pod: &Pod, size: Size) -> u64 {
    size.memory.saturating_sub(pod.size().boot.memory)
}
