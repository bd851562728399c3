//! The guest agent: PID 1 of nutshell's microVM.
//!
//! It serves the shim's requests over one stream (see `nutshell_protocol`): it creates containers with
//! libcontainer, relays their standard streams, reaps processes and reports their exits.
//!
//! The agent has one thread and one event loop ([`agent`]). Operations that may block run in forked jobs ([`job`]).
//! Imports point downwards in this order: [`agent`]; [`container`] (create, start, exec, delete) and [`pod`] (what
//! the containers of a pod share); [`machine`] (the guest as a whole) and [`cgroup`]; [`stdio`] (standard
//! streams); [`job`], [`connection`] (vsock), [`poller`], [`reaper`]; [`failure`] and [`sys`] (all unsafe code).
//!
//! `nutshell-agent --test-unix DIRECTORY` does not set up the machine and connects to Unix sockets in a directory
//! instead of to the host. The tests run it this way.

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

use agent::{Agent, AgentError};
use connection::{AgentStreamError, HostAddress};
use container::hooks;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [flag, arguments @ ..] if flag == hooks::HOOKS_FLAG => hooks::run_in_rootfs(arguments),
        [flag, directory] if flag == "--test-unix" => serve_test(&HostAddress::Unix(directory.into())),
        _ if rustix::process::getpid().is_init() => {
            let Err(error) = serve_machine();
            // The host logs the last lines of the console if a guest ends unexpectedly.
            eprintln!("nutshell-agent: {error}");
            machine::reboot()
        }
        _ => {
            eprintln!("nutshell-agent: run this as PID 1 of a nutshell machine, or with --test-unix DIRECTORY");
            ExitCode::from(2)
        }
    }
}

fn serve_machine() -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    machine::set_up()?;
    Ok(Agent::connect(HostAddress::Vsock)?.serve()?)
}

fn serve_test(host: &HostAddress) -> ExitCode {
    let served = sys::become_subreaper()
        .map_err(AgentError::from)
        .and_then(|()| Agent::connect(host.clone())?.serve());
    match served {
        Err(AgentError::Stream(AgentStreamError::Closed)) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nutshell-agent: {error}");
            ExitCode::FAILURE
        }
        Ok(never) => match never {},
    }
}
