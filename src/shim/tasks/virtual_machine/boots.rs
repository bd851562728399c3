//! The boots of a virtual machine, from Start to its end.

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    oci::{ContainerId, OnReboot},
    shim::{
        error::TaskError,
        machine::{Machine, MachineExit},
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

/// How long a guest may write nothing to its console before that is logged.
const SILENCE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

/// The name of the serial port in the statistics of a machine.
const SERIAL_PORT: &str = "serial";

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
        watch_for_silence(container, container.pod.machine());
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
                report_end(
                    id,
                    &ending,
                    machine.is_short_run(),
                    "has switched its virtual machine off",
                );
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
            let is_short_run = machine.is_short_run();
            if machine.on_reboot() == OnReboot::Exit || machine.is_end_requested() {
                report_end(
                    id,
                    &ending,
                    is_short_run,
                    "has reset its virtual machine, which ends its task",
                );
                return match ending.panic() {
                    Some(_) if !machine.is_end_requested() => SIGKILL_STATUS,
                    _ => POWER_OFF_STATUS,
                };
            }
            report_end(
                id,
                &ending,
                is_short_run,
                "has reset its virtual machine, which boots again",
            );
            let rebooted = machine.reboot(id, pod, self.launcher.as_ref(), self.configuration.ready_timeout);
            match rebooted.await {
                Ok(next) => {
                    watch_for_silence(container, next.clone());
                    self.serve_agent(container, machine, next.clone());
                    current = next;
                }
                Err(VmError::Ended) => {
                    // The machine of the pod may be the disk reader, or a machine that waits for its boot.
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

/// Logs that the guest has ended its machine: with the end of its console, if it may have done so because it could not
/// boot. `action` is a verb with its object.
fn report_end(id: &ContainerId, ending: &MachineExit, is_short_run: bool, action: &str) {
    let console = match ending.console() {
        "" => "its console is empty".to_owned(),
        console => format!("the end of its console:\n{console}"),
    };
    match ending.panic() {
        Some(panic) => log::warn!("task {id}: the guest {action}, after its kernel has panicked: {panic}; {console}"),
        None if is_short_run => log::warn!("task {id}: the guest {action}, soon after its start; {console}"),
        None => log::info!("task {id}: the guest {action}"),
    }
}

/// Logs a warning if the guest of `machine` writes nothing to its console for a long time after its start. Otherwise a
/// kernel that hangs, or that does not know the console, would leave no trace.
fn watch_for_silence(container: &Container, machine: Arc<Machine>) {
    let id = container.id.clone();
    tokio::spawn(async move {
        if tokio::time::timeout(SILENCE_LIMIT, machine.ended()).await.is_ok() {
            return;
        }
        // A vmm that does not answer is reported by other calls.
        let Ok(statistics) = machine.statistics().await else {
            return;
        };
        let serial = statistics.devices.iter().find(|device| device.name == SERIAL_PORT);
        if serial.is_some_and(|serial| serial.bytes_from_guest == 0) {
            log::warn!(
                "task {id}: the guest has written nothing to its console, the serial port ttyS0, since its start {} s \
                 ago: its kernel hangs, or lacks the driver of the serial port or of PCI",
                SILENCE_LIMIT.as_secs()
            );
        }
    });
}
