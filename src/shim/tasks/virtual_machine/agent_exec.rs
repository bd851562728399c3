//! Execs in a virtual machine by nutshell's agent, which runs as a service in its guest. They are like execs in a
//! container, except that the agent may end while the machine continues.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use nutshell_protocol::Request;

use super::calls::follow_exec_kill;
use crate::shim::{
    error::{ErrorCode, TaskError},
    machine::{Agent, FINAL_NOTICE_TIMEOUT, Machine, describe_request},
    tasks::{
        Tasks,
        agent_call::check_response,
        container::{
            Container,
            lifecycle::{Exit, SIGKILL_STATUS},
            process::Process,
            signal::SIGKILL,
        },
        limits::{KILL_LIMIT, REQUEST_LIMIT},
        steps::exec::start_exec_in_guest,
    },
    vm::VirtualMachine,
};

/// If a connection was shorter than this, the next one is accepted only after this time: a guest controls how often its
/// agent connects.
const MIN_CONNECTION_INTERVAL: Duration = Duration::from_secs(1);

impl Tasks {
    /// Lets the agent in the guest of `machine` connect, and connect again after its end, until the machine ends.
    pub(super) fn serve_agent(
        self: &Arc<Self>,
        container: &Container,
        virtual_machine: &Arc<VirtualMachine>,
        machine: Arc<Machine>,
    ) {
        if !virtual_machine.has_agent() {
            return;
        }
        let (tasks, virtual_machine) = (Arc::downgrade(self), virtual_machine.clone());
        let (id, pod) = (container.id.clone(), container.pod.number());
        tokio::spawn(async move {
            let mut is_failing = false;
            while !machine.has_ended() {
                let tasks = tasks.clone();
                let accepted = machine.accept_agent(move |event| {
                    if let Some(tasks) = tasks.upgrade() {
                        tasks.on_event(pod, event);
                    }
                });
                let (agent, end) = match accepted.await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // The machine may be ending.
                        if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, machine.ended())
                            .await
                            .is_ok()
                        {
                            return;
                        }
                        if !std::mem::replace(&mut is_failing, true) {
                            log::warn!("task {id}: no agent can connect yet: {error}");
                        }
                        continue;
                    }
                };
                is_failing = false;
                virtual_machine.set_agent(Some(agent.clone()));
                let accepted_at = Instant::now();
                tokio::pin!(end);
                let mut is_connected = false;
                loop {
                    tokio::select! {
                        reason = &mut end => {
                            if is_connected && !machine.has_ended() {
                                log::info!("task {id}: the agent of the guest is disconnected: {reason}");
                            }
                            break;
                        }
                        ready = agent.ready(), if !is_connected => {
                            log::info!("task {id}: the agent {} of the guest is connected", ready.version);
                            is_connected = true;
                        }
                        _ = machine.ended() => return,
                    }
                }
                if accepted_at.elapsed() < MIN_CONNECTION_INTERVAL {
                    tokio::select! {
                        () = tokio::time::sleep(MIN_CONNECTION_INTERVAL) => {}
                        _ = machine.ended() => return,
                    }
                }
            }
        });
    }

    /// Starts a process in the guest through the connected agent. Records its exit if the agent ends first.
    pub(super) async fn start_exec_by_agent(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        exec: &str,
        agent: Agent,
    ) -> Result<(), TaskError> {
        process.set_agent(agent.clone());
        match start_exec_in_guest(container, process, exec, &self.stdio, &agent).await {
            Ok(guest_pid) => process.set_guest_pid(guest_pid),
            Err(error) => {
                if error.code() == ErrorCode::Unavailable {
                    // The agent may have started the process, or may start it later.
                    let kill = agent.run(signal_request(container, process, SIGKILL));
                    if let Ok(Err(error)) = tokio::time::timeout(KILL_LIMIT, kill).await {
                        log::debug!("task {}: exec {exec} is not killed: {error}", container.id);
                    }
                }
                return Err(error);
            }
        }
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move {
            let status = tokio::select! {
                biased;
                _ = process.lifecycle.wait_exit() => return,
                status = process.abandoned() => status,
                // The agent ends its processes when it ends.
                () = agent.ended() => SIGKILL_STATUS,
            };
            if process.try_claim_exit() {
                tasks.record_exit(&container, &process, Exit::now(status)).await;
            }
        });
        Ok(())
    }
}

/// Kill of an exec that `agent` runs. After SIGKILL, an exit is recorded in any case.
pub(super) async fn signal_exec_by_agent(
    container: &Container,
    process: &Arc<Process>,
    agent: &Agent,
    signal: u32,
) -> Result<(), TaskError> {
    let request = signal_request(container, process, signal);
    let action = describe_request(&request);
    let response = tokio::time::timeout(KILL_LIMIT, agent.run(request)).await;
    let sent = check_response(KILL_LIMIT, &action, response.ok());
    if signal == SIGKILL {
        follow_exec_kill(container, process, sent.is_ok());
        return match sent {
            Err(error) if error.code() == ErrorCode::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    sent
}

/// ResizePty of an exec that `agent` runs.
pub(in crate::shim::tasks) async fn resize_exec_by_agent(
    container: &Container,
    process: &Process,
    agent: &Agent,
    (width, height): (u16, u16),
) -> Result<(), TaskError> {
    let request = Request::Resize {
        container: container.id.to_string(),
        exec: process.exec.clone(),
        width,
        height,
    };
    let action = describe_request(&request);
    let response = tokio::time::timeout(REQUEST_LIMIT, agent.run(request)).await;
    match check_response(REQUEST_LIMIT, &action, response.ok()) {
        // The process ended meanwhile.
        Err(error) if error.code() == ErrorCode::NotFound => Ok(()),
        response => response,
    }
}

fn signal_request(container: &Container, process: &Process, signal: u32) -> Request {
    Request::Signal {
        container: container.id.to_string(),
        exec: process.exec.clone(),
        signal,
        all: false,
    }
}
