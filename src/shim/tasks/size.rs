//! The size of a pod's machine follows the limits of the containers in it.

use std::{sync::Arc, time::Duration};

use nutshell_protocol::Request;

use super::{ANSWER_LIMIT, Container, Role, Tasks, ask, gone};
use crate::{
    oci::{Limits, Size},
    shim::{error::TaskError, machine::VmmError, pod::Pod},
};

/// How long the guest may take to bring memory into use.
const PLUG_LIMIT: Duration = Duration::from_secs(10);

impl Tasks {
    /// Gives the machine of `pod` the size that its members come to. What grows is there for the guest's
    /// processes afterwards; what shrinks goes when the guest can spare it.
    ///
    /// # Errors
    ///
    /// The machine cannot grow; it goes on with what it has.
    pub(super) async fn fit(&self, pod: &Pod) -> Result<(), TaskError> {
        let change = |from: Size, to: Size| async move {
            let what = format!(
                "change the virtual machine from {} MiB and {} vCPUs to {} MiB and {}",
                from.memory >> 20,
                from.vcpus,
                to.memory >> 20,
                to.vcpus
            );
            log::debug!("{what}");
            let changed = change(pod, from, to).await;
            if changed.is_err() {
                // A guest that was late may not have in the end what it is not accounted for.
                if let Err(error) = ask_for(pod, to, from).await {
                    log::info!("{what}, and back again: {error}");
                }
            }
            changed.map_err(|error| error.during(&what))
        };
        pod.resize(|| self.wanted_size(pod), change).await
    }

    /// The same, where nobody waits for it: a member needs less, or is gone.
    pub(super) fn fit_later(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (tasks, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = tasks.fit(&pod).await {
                log::info!("{error}");
            }
        });
    }

    /// The same, after a container has left the table.
    pub(super) fn fit_without(self: &Arc<Self>, container: &Container) {
        if matches!(container.role, Role::Member { .. }) {
            self.fit_later(&container.pod);
        }
    }

    fn wanted_size(&self, pod: &Pod) -> Size {
        let members = self.members(pod.number());
        let present = members
            .iter()
            .filter(|member| member.init.lifecycle.phase().exit().is_none());
        let limits = Limits::sum(present.map(|member| member.limits()));
        pod.size().size_for(limits, pod.memory_limit())
    }
}

/// Changes the size, and waits for memory that comes.
async fn change(pod: &Pod, from: Size, to: Size) -> Result<(), TaskError> {
    ask_for(pod, from, to).await?;
    if to.memory <= from.memory {
        return Ok(());
    }
    let machine = pod.machine();
    machine
        .within(PLUG_LIMIT, machine.memory_plugged(beyond(pod, to)))
        .await
        .ok_or_else(|| {
            let text = format!("the guest did not take the memory within {} s", PLUG_LIMIT.as_secs());
            TaskError::unknown(text)
        })
}

/// Lets the guest have what there is more, and asks for what there is less.
async fn ask_for(pod: &Pod, from: Size, to: Size) -> Result<(), TaskError> {
    let machine = pod.machine();
    match machine.resize(beyond(pod, to), to.vcpus).await {
        Ok(()) => {}
        Err(VmmError::Refused(reason)) => return Err(TaskError::unknown(reason)),
        Err(VmmError::Channel(error)) => return Err(gone(pod, &error).await),
    }
    let fit = Request::ResizeMachine {
        vcpus: to.vcpus.into(),
        has_memory_device: beyond(pod, from).max(beyond(pod, to)) > 0,
    };
    ask(pod, ANSWER_LIMIT, machine.agent().run(fit)).await
}

/// The memory of a size that the machine did not boot with, in bytes.
fn beyond(pod: &Pod, size: Size) -> u64 {
    size.memory.saturating_sub(pod.size().boot.memory)
}
