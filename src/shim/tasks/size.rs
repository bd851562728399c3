//! The size of a pod's machine follows the limits of the containers in it.

use std::{sync::Arc, time::Duration};

use nutshell_protocol::Request;

use super::{ANSWER_LIMIT, Tasks, ask, gone};
use crate::{
    oci::{Limits, Size},
    shim::{error::TaskError, log, pod::Pod},
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
            log::debug(&what);
            change(pod, from, to).await.map_err(|error| error.during(&what))
        };
        pod.resize(|| self.wanted_size(pod), change).await
    }

    /// The same, where nobody waits for it: a member needs less, or nothing any more.
    pub(super) fn fit_later(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (tasks, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = tasks.fit(&pod).await {
                log::info(&error.to_string());
            }
        });
    }

    fn wanted_size(&self, pod: &Pod) -> Size {
        let members = self.members(pod.number());
        let present = members
            .iter()
            .filter(|member| member.init.lifecycle.phase().exit().is_none());
        pod.size()
            .for_limits(Limits::sum(present.map(|member| member.limits())))
    }
}

async fn change(pod: &Pod, from: Size, to: Size) -> Result<(), TaskError> {
    let machine = pod.machine();
    let beyond = |size: Size| size.memory.saturating_sub(pod.size().boot.memory);
    match machine.resize(beyond(to), to.vcpus).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(TaskError::unknown(error)),
        Err(error) => return Err(gone(pod, &error).await),
    }
    let fit = Request::FitMachine {
        processors: to.vcpus.into(),
        memory: beyond(from).max(beyond(to)) > 0,
    };
    ask(pod, ANSWER_LIMIT, machine.agent().run(fit)).await?;
    if to.memory <= from.memory {
        return Ok(());
    }
    machine
        .within(PLUG_LIMIT, machine.plugged(beyond(to)))
        .await
        .ok_or_else(|| {
            let text = format!("the guest did not take the memory within {} s", PLUG_LIMIT.as_secs());
            TaskError::unknown(text)
        })
}
