//! The guest agent: PID 1 of nutshell's microVM, or a service in the guest of a virtual machine with a user's kernel.
//!
//! It serves the shim's requests over one stream (see `nutshell_protocol`): it creates containers with
//! libcontainer, relays their standard streams, reaps processes and reports their exits.
//!
//! The agent has one thread and one event loop ([`agent`]). Operations that may block run in forked jobs ([`job`]).
//! Imports point downwards in this order: [`agent`]; [`container`] (create, start, exec, delete) and [`pod`] (what
//! the containers of a pod share); [`machine`] (the guest as a whole) and [`cgroup`]; [`stdio`] (standard
//! streams); [`job`], [`connection`] (vsock), [`poller`], [`reaper`]; [`failure`] and [`sys`] (all unsafe code).
//!
//! As a service, `nutshell-agent serve`, it runs processes in the guest itself and forwards connections. It creates no
//! containers, and the rest of the guest belongs to the user.
//!
//! `nutshell-agent --test-unix DIRECTORY [serve]` does not set up the machine and connects to Unix sockets in a
//! directory instead of to the host. The tests run it this way.

mod agent;
mod cgroup;
mod connection;
mod container;
mod failure;
mod job;
mod machine;
mod pod;
mod poller;
mod reaper;
mod stdio;
mod sys;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use agent::{Agent, AgentError, Role};
use connection::{AgentStreamError, HostAddress};
use container::hooks;

/// Selects [`Role::Service`].
const SERVE_COMMAND: &str = "serve";

const TEST_FLAG: &str = "--test-unix";

/// The time between two attempts of a service to connect.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [flag, arguments @ ..] if flag == hooks::HOOKS_FLAG => hooks::run_in_rootfs(arguments),
        [flag, directory] if flag == TEST_FLAG => serve(Role::Init, &HostAddress::Unix(directory.into())),
        [flag, directory, command] if flag == TEST_FLAG && command == SERVE_COMMAND => {
            serve(Role::Service, &HostAddress::Unix(directory.into()))
        }
        [command] if command == SERVE_COMMAND => serve(Role::Service, &HostAddress::Vsock),
        _ if rustix::process::getpid().is_init() => {
            let Err(error) = serve_machine();
            // The host logs the last lines of the console if a guest ends unexpectedly.
            eprintln!("nutshell-agent: {error}");
            machine::reboot()
        }
        _ => {
            eprintln!(
                "nutshell-agent: run this as PID 1 of a nutshell machine, or as a service in a virtual machine of \
                 nutshell: nutshell-agent serve"
            );
            ExitCode::from(2)
        }
    }
}

fn serve_machine() -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    machine::set_up()?;
    Ok(Agent::connect(Role::Init, HostAddress::Vsock)?.serve()?)
}

/// Connects to the host. A service tries again after a failure: the driver of the vsock device may not be loaded yet.
/// The host also refuses a second connection, and any connection for a while after a short one.
fn connect(role: Role, host: &HostAddress) -> Result<Agent, AgentError> {
    let mut reported = None;
    loop {
        match Agent::connect(role, host.clone()) {
            Err(error) if role == Role::Service => {
                let text = error.to_string();
                if reported.as_ref() != Some(&text) {
                    eprintln!("nutshell-agent: cannot connect to the host yet: {text}");
                    reported = Some(text);
                }
                // No event reports that the host accepts connections.
                thread::sleep(RETRY_INTERVAL);
            }
            connected => return connected,
        }
    }
}

/// Serves until the host closes the agent stream.
fn serve(role: Role, host: &HostAddress) -> ExitCode {
    let served = sys::become_subreaper()
        .map_err(AgentError::system("become a subreaper"))
        .and_then(|()| connect(role, host)?.serve());
    match served {
        Err(AgentError::Stream(AgentStreamError::Closed)) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nutshell-agent: {error}");
            ExitCode::FAILURE
        }
        Ok(never) => match never {},
    }
}
