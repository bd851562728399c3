//! The start of an exec by nutshell's agent, in the guest of a pod or of a virtual machine.

use std::sync::Arc;

use nutshell_protocol::{Request, StartExec};

use crate::shim::tasks::{
    agent_call::{call_agent, machine_ended},
    container::{Container, process::Process},
    limits::CREATE_LIMIT,
    steps::host::EXEC_CONTEXT,
};
use crate::shim::{
    error::TaskError,
    machine::{Agent, describe_request},
    pod::{NetworkNamespace, PidHolder},
    stdio::StdioContext,
};

/// Opens the streams of an exec, creates its host pid and makes `agent` start it. Returns its pid in the guest.
pub(in crate::shim::tasks) async fn start_exec_in_guest(
    container: &Container,
    process: &Process,
    exec: &str,
    context: &StdioContext,
    agent: &Agent,
) -> Result<u32, TaskError> {
    let machine = container.pod.machine();
    let opened = process
        .stdio_spec
        .open(exec, context)
        .await
        .map_err(|error| TaskError::unknown(error.to_string()).during(EXEC_CONTEXT))?;
    let holder = PidHolder::spawn(&NetworkNamespace::Inherited).map_err(|error| {
        TaskError::unknown(format!("cannot create the host process of the exec: {error}")).during(EXEC_CONTEXT)
    })?;
    process.set_pid_holder(Arc::new(holder));
    let (streams, stdio) = match opened.connect(&machine, process.terminal_size()).await {
        Ok(connected) => connected,
        Err(error) => return Err(machine_ended(&container.pod, &error).await.during(EXEC_CONTEXT)),
    };
    process.set_streams(streams);
    let start = Request::StartExec(StartExec {
        container: container.id.to_string(),
        exec: exec.to_owned(),
        process: process.take_spec(),
        stdio,
    });
    let action = describe_request(&start);
    call_agent(&container.pod, CREATE_LIMIT, &action, agent.create(start))
        .await
        .map_err(|error| error.during(EXEC_CONTEXT))
}
