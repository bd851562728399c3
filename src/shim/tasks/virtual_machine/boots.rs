//! The boots of a virtual machine, from Start to its end.

use std::{path::Path, sync::Arc};

use crate::{
    oci::OnReboot,
    shim::{
        error::TaskError,
        machine::Machine,
        pod::open_network_namespace,
        tasks::{
            Tasks,
            container::{
                Container, Role,
                lifecycle::{Exit, SIGKILL_STATUS},
            },
            steps::host::vm_error,
        },
        vm::{VirtualMachine, VmError},
    },
};

/// The exit status after the guest has switched the machine off.
const POWER_OFF_STATUS: u32 = 0;

impl Tasks {
    /// Boots a virtual machine with the links that its network namespace has now.
    pub(in crate::shim::tasks) async fn start_virtual_machine(
        self: &Arc<Self>,
        container: &Container,
    ) -> Result<(), TaskError> {
        let Some(machine) = &container.virtual_machine else {
            return Err(TaskError::unknown("it is not a virtual machine"));
        };
        let booted = async {
            let path = format!("/proc/{}/ns/net", container.init.pid());
            let namespace = open_network_namespace(Path::new(&path)).map_err(VmError::Links)?;
            // Clients such as `kubectl port-forward` connect in the namespaces of pods only.
            let forwarding = matches!(container.role, Role::Member { .. });
            machine.connect_network(namespace, forwarding).await?;
            let pod = &container.pod;
            machine
                .boot(&container.id, pod, self.launcher.as_ref(), &pod.machine())
                .await
        };
        booted.await.map_err(|error| vm_error(&error))?;
        self.serve_agent(container, machine, container.pod.machine());
        Ok(())
    }

    /// Follows a virtual machine to its end, from one boot to the next, and records its exit.
    pub(super) fn watch_virtual_machine(self: &Arc<Self>, container: &Arc<Container>, machine: &Arc<VirtualMachine>) {
        let (tasks, container, machine) = (self.clone(), container.clone(), machine.clone());
        tokio::spawn(async move {
            let status = tasks.follow_boots(&container, &machine).await;
            machine.end_console();
            if container.init.try_claim_exit() {
                // Before the exit is announced, because CNI removes the network namespace after that.
                machine.disconnect_network().await;
                tasks.end_execs(&container).await;
                tasks.record_exit(&container, &container.init, Exit::now(status)).await;
            }
        });
    }

    /// Waits for the end of a virtual machine, and boots it again if its guest has reset it. Returns its exit status.
    async fn follow_boots(self: &Arc<Self>, container: &Container, machine: &Arc<VirtualMachine>) -> u32 {
        let (id, pod) = (&container.id, &container.pod);
        let mut current: Arc<Machine> = pod.machine();
        loop {
            let ending = current.ended().await;
            if let Some(status) = machine.killed_status() {
                return status;
            }
            if ending.is_power_off() {
                log::info!("task {id}: the guest has switched its virtual machine off");
                return POWER_OFF_STATUS;
            }
            if !ending.is_reset() {
                if current.was_stopped() {
                    log::debug!("task {id}: the virtual machine ended: {ending}");
                } else {
                    log::error!("task {id}: the virtual machine ended: {ending}");
                }
                return SIGKILL_STATUS;
            }
            if machine.on_reboot() == OnReboot::Exit || machine.is_end_requested() {
                log::info!("task {id}: the guest has reset its virtual machine, which ends its task");
                return POWER_OFF_STATUS;
            }
            log::info!("task {id}: the guest has reset its virtual machine, which boots again");
            let rebooted = machine.reboot(id, pod, self.launcher.as_ref(), self.configuration.ready_timeout);
            match rebooted.await {
                Ok(next) => {
                    self.serve_agent(container, machine, next.clone());
                    current = next;
                }
                Err(VmError::Ended) => {
                    // It may be the disk reader, or a machine that waits for its boot.
                    pod.machine()
                        .stop("a client has requested the end of the virtual machine");
                    pod.machine().ended().await;
                    return machine.killed_status().unwrap_or(POWER_OFF_STATUS);
                }
                Err(error) => {
                    if !pod.is_closed() && machine.killed_status().is_none() {
                        log::error!("task {id}: the virtual machine does not boot again: {error}");
                    }
                    pod.machine().stop("it does not boot again");
                    pod.machine().ended().await;
                    return machine.killed_status().unwrap_or(SIGKILL_STATUS);
                }
            }
        }
    }
}
