//! The guest agent: PID 1 of nutshell's microVM.
//!
//! It does what the shim asks for over one stream (see `nutshell_protocol`): creates containers with
//! libcontainer, moves their standard streams, reaps and reports. One thread, one event loop
//! ([`agent`]); what may block is done in forked jobs ([`job`]). `machine` is the set-up as PID 1,
//! `pod` what a pod's containers share, `container` what containers are made of, `stdio` the streams, `sys` the only unsafe code.
//!
//! `nutshell-agent --test-unix FOLDER` leaves the machine as it is and dials sockets in a folder
//! instead of the host: how the tests run it.

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
use connection::{ControlError, HostAddress};
use container::hooks;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [flag, arguments @ ..] if flag == hooks::HOOKS_FLAG => hooks::run_in_rootfs(arguments),
        [flag, folder] if flag == "--test-unix" => serve_test(&HostAddress::Unix(folder.into())),
        _ if rustix::process::getpid().is_init() => {
            let Err(error) = serve_machine();
            // The host reads the console's last lines when a guest ends without being asked to.
            eprintln!("nutshell-agent: {error}");
            machine::reboot()
        }
        _ => {
            eprintln!("nutshell-agent: runs as PID 1 of a nutshell machine, or with --test-unix FOLDER");
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
        Err(AgentError::Control(ControlError::Closed)) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nutshell-agent: {error}");
            ExitCode::FAILURE
        }
        Ok(never) => match never {},
    }
}
