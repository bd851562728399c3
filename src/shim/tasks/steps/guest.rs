//! Steps in the guest that precede its first container: the set-up of the resources that the pod's containers share,
//! and of the network.

use nutshell_protocol::Request;

use crate::shim::tasks::{agent_call::run_in_guest, limits::CREATE_LIMIT, table::Tasks};
use crate::shim::{error::TaskError, pod::Pod};

impl Tasks {
    /// Waits until the guest of a pod is ready, and sets up the resources that the pod's containers share. Does so
    /// once: later calls return the result of the first. No-op for the pod of a single container, which shares nothing.
    pub(in crate::shim::tasks) async fn set_up_pod(&self, pod: &Pod) -> Result<(), TaskError> {
        pod.set_up(|request| async {
            let ready = pod.machine().ready(self.configuration.ready_timeout).await;
            ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
            // The pod's sysctls may name network interfaces, which CNI has created before the sandbox.
            let tasks = self.tasks_of_pod(pod.number());
            if let Some(sandbox) = tasks.iter().find(|task| task.is_sandbox()) {
                self.connect_network(pod, sandbox.init.pid(), true).await?;
            }
            run_in_guest(pod, CREATE_LIMIT, Request::SetUpPod(request))
                .await
                .map_err(|error| error.during("set up the pod"))
        })
        .await
    }

    /// Connects the machine of a pod to the network namespace of the process `pid`. With `forward_loopback`,
    /// connections to the namespace's loopback interface are forwarded to the guest.
    pub(in crate::shim::tasks) async fn connect_network(
        &self,
        pod: &Pod,
        pid: u32,
        forward_loopback: bool,
    ) -> Result<(), TaskError> {
        let ready = pod.machine().ready(self.configuration.ready_timeout).await;
        ready.map_err(|ending| TaskError::unknown(ending.to_string()))?;
        match tokio::time::timeout(CREATE_LIMIT, pod.connect_network(pid, forward_loopback)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(TaskError::unknown(error.to_string())),
            Err(_) => Err(TaskError::unknown(format!(
                "the virtual machine did not get its network within {} s",
                CREATE_LIMIT.as_secs()
            ))),
        }
    }
}
