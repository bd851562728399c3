//! Execs in a virtual machine, by nutshell's agent in its guest ([`super::agent_exec`]) or else by the QEMU guest
//! agent.
//!
//! The QEMU guest agent runs processes as root, without a terminal. It takes the whole standard input with the command
//! and returns the whole output after the end, so an exec with an input starts its process when the input has ended. It
//! cannot send signals, so a shell in the guest sends them.

use std::{sync::Arc, time::Duration};

use super::{
    agent_exec::signal_exec_by_agent,
    calls::{follow_exec_kill, no_agent},
};
use crate::{
    oci::GuestProcess,
    shim::{
        error::{ErrorCode, TaskError},
        machine::Machine,
        pod::{NetworkNamespace, PidHolder},
        stdio::{CapturedStreams, InputError},
        tasks::{
            Tasks,
            agent_call::already_finished,
            container::{
                Container,
                lifecycle::{Exit, SIGKILL_STATUS, UNKNOWN_STATUS},
                process::Process,
                signal::{SIGKILL, is_terminating},
            },
            limits::{DRAIN_LIMIT, KILL_LIMIT},
            steps::host::EXEC_CONTEXT,
        },
        vm::{Finished, GuestAgent, GuestAgentError, Program, VirtualMachine},
    },
};

/// The maximum size of a standard input in bytes.
const MAX_INPUT: u64 = 2 << 20;

/// How long `inspect` waits for the version of an agent.
const VERSION_LIMIT: Duration = Duration::from_secs(1);

/// A shell script that enters the directory in its first argument and executes the others: the agent cannot set a
/// working directory.
const CHANGE_DIRECTORY: &str = "cd -- \"$1\" && shift && exec \"$@\"";

/// An exec in progress.
#[derive(Debug)]
struct Execution {
    /// The machine in which it runs.
    machine: Arc<Machine>,
    agent: Arc<GuestAgent>,
    program: Program,
    streams: CapturedStreams,
    /// `None` until it is started.
    guest_pid: Option<u32>,
}

/// Why an execution has no result.
#[derive(Debug, thiserror::Error)]
enum ExecutionError {
    #[error(transparent)]
    Input(#[from] InputError),
    #[error(transparent)]
    Agent(#[from] GuestAgentError),
}

/// Fails if no agent answers, or if the one that answers cannot run a process with these streams. Takes less than a
/// second if no agent has answered before.
pub(in crate::shim::tasks) async fn check_can_exec(machine: &VirtualMachine, terminal: bool) -> Result<(), TaskError> {
    if machine.connected_agent().is_some() {
        return Ok(());
    }
    let no_agent = || no_agent("start a process");
    let (machine, agent) = machine.running_guest_agent().ok_or_else(no_agent)?;
    match machine.is_guest_agent_port_open().await {
        Ok(true) => {}
        Ok(false) => return Err(no_agent()),
        Err(error) => {
            log::debug!("cannot read the state of the guest agent's port: {error}");
            return Err(no_agent());
        }
    }
    if let Err(error) = agent.synchronize().await {
        log::info!("the guest has the port of its agent open, but no agent answers: {error}");
        return Err(no_agent());
    }
    match terminal {
        false => Ok(()),
        true => Err(TaskError::new(
            ErrorCode::InvalidArgument,
            "the QEMU guest agent of a virtual machine starts processes without a terminal only: exec without one, run \
             nutshell's agent in the guest, or use the console of the virtual machine (attach)",
        )),
    }
}

/// The kind and version of the agent of a guest. `None` if none answers within [`VERSION_LIMIT`].
pub(in crate::shim::tasks) async fn guest_agent_version(machine: &VirtualMachine) -> Option<String> {
    if let Some((_, version)) = machine.connected_agent() {
        return Some(format!("nutshell {version}"));
    }
    let (machine, agent) = machine.running_guest_agent()?;
    let version = async {
        match machine.is_guest_agent_port_open().await {
            Ok(true) => agent.version().await.ok(),
            _ => None,
        }
    };
    let version = tokio::time::timeout(VERSION_LIMIT, version).await.ok().flatten();
    version.map(|version| format!("QEMU {version}"))
}

impl Tasks {
    /// Starts an exec, or lets it wait for the end of its standard input if it has one.
    pub(in crate::shim::tasks) async fn start_exec_in_virtual_machine(
        self: &Arc<Self>,
        container: &Arc<Container>,
        virtual_machine: &VirtualMachine,
        process: &Arc<Process>,
        exec: &str,
    ) -> Result<(), TaskError> {
        if let Some((agent, _)) = virtual_machine.connected_agent() {
            return self.start_exec_by_agent(container, process, exec, agent).await;
        }
        let failed = |text: String| TaskError::unknown(text).during(EXEC_CONTEXT);
        if process.stdio_spec.terminal {
            return Err(failed(
                "nutshell's agent in the guest, which a terminal needs, is not connected any more".to_owned(),
            ));
        }
        let (machine, agent) = virtual_machine
            .running_guest_agent()
            .ok_or_else(|| no_agent("start a process"))?;
        let guest_process = GuestProcess::parse(&process.take_spec())
            .map_err(|error| TaskError::new(ErrorCode::InvalidArgument, error.to_string()).during(EXEC_CONTEXT))?;
        let opened = process.stdio_spec.open(exec, &self.stdio).await;
        let (streams, captured) = opened.map_err(|error| failed(error.to_string()))?.into_captured();
        process.set_streams(streams);
        let holder = PidHolder::spawn(&NetworkNamespace::Inherited)
            .map_err(|error| failed(format!("cannot create the host process of the exec: {error}")))?;
        process.set_pid_holder(Arc::new(holder));
        let mut execution = Execution {
            machine,
            agent,
            program: make_program(guest_process),
            streams: captured,
            guest_pid: None,
        };
        if !execution.streams.has_input() {
            let name = execution.program.path.clone();
            execution
                .start(process)
                .await
                .map_err(|error| failed(format!("exec: {name:?}: {error}")))?;
        }
        let (tasks, container, process) = (self.clone(), container.clone(), process.clone());
        tokio::spawn(async move { tasks.follow_execution(&container, &process, execution).await });
        Ok(())
    }

    /// Follows an exec to its end, delivers its output, and records its exit.
    async fn follow_execution(&self, container: &Container, process: &Process, mut execution: Execution) {
        let id = &container.id;
        let exec = process.exec.as_deref().unwrap_or_default();
        let machine = execution.machine.clone();
        let finished = tokio::select! {
            biased;
            finished = execution.run(process) => finished,
            status = process.abandoned() => Ok(without_output(status)),
            _ = machine.ended() => Ok(without_output(SIGKILL_STATUS)),
        };
        if !process.try_claim_exit() {
            return;
        }
        let Finished {
            status,
            stdout,
            stderr,
            is_truncated,
        } = finished.unwrap_or_else(|error| {
            log::warn!("task {id}: exec {exec} ended without a result: {error}");
            let text = format!("nutshell: {error}\n").into_bytes();
            let (stdout, stderr) = match execution.streams.has_stderr() {
                true => (Vec::new(), text),
                false => (text, Vec::new()),
            };
            Finished {
                stdout,
                stderr,
                ..without_output(UNKNOWN_STATUS)
            }
        });
        if is_truncated {
            log::warn!("task {id}: exec {exec}: the guest agent has dropped a part of the output");
        }
        if let Err(error) = execution.streams.deliver(stdout, stderr, DRAIN_LIMIT).await {
            log::warn!("task {id}: exec {exec}: a part of the output is lost: {error}");
        }
        self.record_exit(container, process, Exit::now(status)).await;
    }
}

impl Execution {
    /// Runs the process to its end.
    async fn run(&mut self, process: &Process) -> Result<Finished, ExecutionError> {
        let pid = match self.guest_pid {
            Some(pid) => pid,
            None => {
                self.program.input = self.streams.read_input(MAX_INPUT).await?;
                self.start(process).await?
            }
        };
        Ok(self.agent.wait(pid).await?)
    }

    async fn start(&mut self, process: &Process) -> Result<u32, GuestAgentError> {
        let pid = self.agent.start(&self.program).await?;
        process.set_guest_pid(pid);
        self.guest_pid = Some(pid);
        Ok(pid)
    }
}

fn without_output(status: u32) -> Finished {
    Finished {
        status,
        stdout: Vec::new(),
        stderr: Vec::new(),
        is_truncated: false,
    }
}

/// The command of the agent for a process.
fn make_program(process: GuestProcess) -> Program {
    let GuestProcess { args, env, cwd, .. } = process;
    let mut words = match &cwd[..] {
        "" | "/" => Vec::new(),
        _ => ["/bin/sh", "-c", CHANGE_DIRECTORY, "sh", &cwd]
            .map(str::to_owned)
            .to_vec(),
    };
    words.extend(args);
    let path = words.remove(0);
    Program {
        path,
        arguments: words,
        environment: env,
        input: Vec::new(),
    }
}

/// Kill of an exec: nutshell's agent sends the signal if it runs the exec, and otherwise a shell in the guest. After
/// SIGKILL, an exit is recorded in any case.
pub(in crate::shim::tasks) async fn signal_exec_in_virtual_machine(
    container: &Container,
    virtual_machine: &VirtualMachine,
    process: &Arc<Process>,
    signal: u32,
) -> Result<(), TaskError> {
    if let Some(agent) = process.agent() {
        return signal_exec_by_agent(container, process, agent, signal).await;
    }
    let pid = process.guest_pid();
    if pid == 0 {
        // The process is not started yet: the exec waits for the end of its standard input.
        if is_terminating(signal) {
            process.abandon(128 + signal);
        }
        return Ok(());
    }
    let sent = match virtual_machine.running_guest_agent() {
        // The machine has ended, and the exit follows.
        None => return Err(already_finished()),
        Some((_, agent)) => send_signal(&agent, pid, signal).await,
    };
    if signal == SIGKILL {
        follow_exec_kill(container, process, sent.is_ok());
        return Ok(());
    }
    sent.map_err(|error| TaskError::unknown(format!("cannot send signal {signal} to guest process {pid}: {error}")))
}

async fn send_signal(agent: &GuestAgent, pid: u32, signal: u32) -> Result<(), String> {
    let kill = Program {
        path: "/bin/sh".to_owned(),
        arguments: vec!["-c".to_owned(), format!("kill -{signal} {pid}")],
        environment: None,
        input: Vec::new(),
    };
    let finished = async { agent.wait(agent.start(&kill).await?).await };
    let finished = tokio::time::timeout(KILL_LIMIT, finished).await;
    match finished {
        Ok(Ok(Finished { status: 0, .. })) => Ok(()),
        Ok(Ok(Finished { status, .. })) => Err(format!("kill exited with status {status}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no result within {} s", KILL_LIMIT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn other_working_directory_is_entered_by_a_shell() {
        for (cwd, expected) in [
            ("/", &["ls", "-l"][..]),
            ("", &["ls", "-l"]),
            ("/a b", &["/bin/sh", "-c", CHANGE_DIRECTORY, "sh", "/a b", "ls", "-l"]),
        ] {
            let spec = json!({"args": ["ls", "-l"], "env": ["A=b"], "cwd": cwd}).to_string();
            let program = make_program(GuestProcess::parse(spec.as_bytes()).unwrap());
            assert_eq!(program.path, expected[0]);
            assert_eq!(program.arguments, expected[1..]);
            assert_eq!(program.environment, Some(vec!["A=b".to_owned()]));
        }
    }
}
