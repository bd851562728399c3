//! Kill, Stats, Update, and the error of other calls for a virtual machine.

use std::sync::Arc;

use nutshell_protocol::ContainerStats;

use crate::{
    oci::{ContainerId, Limits},
    shim::{
        error::{ErrorCode, TaskError},
        tasks::{
            container::{
                Container,
                lifecycle::{Phase, SIGKILL_STATUS},
                process::Process,
                signal::{SIGKILL, is_terminating},
            },
            limits::KILL_LIMIT,
        },
        vm::{VirtualMachine, process_statistics},
    },
};

/// Signals that ask a guest to end: they press its power button.
const POWER_BUTTON_SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGPWR];

/// Kill: SIGKILL ends the machine at once, signals that ask a process to end press its power button, and others have no
/// effect.
pub(in crate::shim::tasks) async fn signal_virtual_machine(
    container: &Container,
    machine: &VirtualMachine,
    signal: u32,
) -> Result<(), TaskError> {
    let is_unstarted = match container.init.lifecycle.phase() {
        Phase::Created => true,
        // Until the machine is built, there is no power button.
        Phase::Starting => !machine.is_running(),
        _ => false,
    };
    if signal == SIGKILL || (is_unstarted && is_terminating(signal)) {
        machine.kill(&container.pod, 128 + signal);
        return Ok(());
    }
    if !POWER_BUTTON_SIGNALS.iter().any(|known| known.unsigned_abs() == signal) {
        log::debug!(
            "task {}: signal {signal} has no effect on a virtual machine",
            container.id
        );
        return Ok(());
    }
    log::info!("task {}: signal {signal} presses the power button", container.id);
    match machine.press_power_button().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let text = format!("cannot press the power button of the virtual machine: {error}");
            Err(TaskError::new(ErrorCode::Unavailable, text))
        }
    }
}

/// Stats: the resource use of the vmm process.
pub(in crate::shim::tasks) fn virtual_machine_stats(
    container: &Container,
    machine: &VirtualMachine,
) -> Result<ContainerStats, TaskError> {
    let (pid, size) = (container.pod.machine().pid(), machine.current_size());
    process_statistics(pid, size).map_err(|error| {
        let text = format!("cannot read the statistics of the vmm process {pid}: {error}");
        TaskError::new(ErrorCode::FailedPrecondition, text)
    })
}

/// Update: changes the memory of the guest. The vCPUs of a virtual machine are those with which it has booted.
pub(in crate::shim::tasks) async fn set_limits_of_virtual_machine(
    id: &ContainerId,
    machine: &VirtualMachine,
    before: Limits,
    after: Limits,
) -> Result<(), TaskError> {
    let memory = machine.size().memory_of_virtual_machine(before, after);
    let memory = memory.map_err(|reason| TaskError::new(ErrorCode::FailedPrecondition, reason))?;
    let Some(memory) = memory else { return Ok(()) };
    machine.set_memory(id, memory).await.map_err(|error| {
        let text = format!("cannot change the memory of the guest to {} MiB: {error}", memory >> 20);
        TaskError::new(ErrorCode::FailedPrecondition, text)
    })
}

/// The error of a call that needs an agent in the guest. `action` is a verb with its object.
pub(in crate::shim::tasks) fn no_agent(action: &str) -> TaskError {
    let text = format!(
        "cannot {action} in the guest of a virtual machine with a user's kernel: neither nutshell's agent nor the QEMU \
         guest agent answers. Use its console (attach), or a login over the network"
    );
    TaskError::new(ErrorCode::Unimplemented, text)
}

/// Reports the exit of an exec that does not end in time after SIGKILL.
pub(super) fn follow_exec_kill(container: &Container, process: &Arc<Process>, was_sent: bool) {
    let (id, process) = (container.id.clone(), process.clone());
    tokio::spawn(async move {
        let ended = process.lifecycle.wait_exit();
        if !was_sent || tokio::time::timeout(KILL_LIMIT, ended).await.is_err() {
            let pid = process.guest_pid();
            log::warn!(
                "task {id}: the guest did not end the process {pid} of an exec that was killed. Its exit is reported \
                 as {SIGKILL_STATUS}, and it may go on in the guest"
            );
            process.abandon(SIGKILL_STATUS);
        }
    });
}
