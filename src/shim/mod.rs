//! containerd's side: the short-lived actions that containerd asks of a v2 shim (`start`, `delete`,
//! `-info`, `-v`) and the daemon that serves it.
//!
//! Lives here: everything that speaks with containerd or owns host resources on behalf of a pod. May
//! not live here: anything that touches guest memory or interprets a spec (that is [`crate::oci`]).
//! Called by `main` for every role but the children's.

mod arguments;
mod bootstrap;
mod cgroup;
mod child;
mod configuration;
mod connection;
mod daemon;
mod delete;
mod error;
mod events;
mod holder;
mod hooks;
mod info;
mod lifecycle;
mod log;
mod machine;
mod metrics;
mod network;
mod options;
mod pod;
mod process;
mod record;
mod sandbox_service;
#[cfg(test)]
mod script;
mod serve;
mod service;
pub(crate) mod share;
mod socket;
mod stdio;
mod tasks;

use std::{
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::PathBuf,
    process::ExitCode,
};

pub(crate) use configuration::Configuration;

use arguments::Action;

use crate::oci::ContainerId;

/// What the daemon is started with.
#[derive(Debug)]
pub(crate) struct ServeContext {
    /// The container, or sandbox, that the shim was started for. Others may join it.
    pub(crate) id: ContainerId,
    /// containerd's namespace of all containers of this shim.
    pub(crate) namespace: String,
    /// The path of containerd's gRPC socket.
    pub(crate) address: String,
    /// The path of containerd's ttrpc socket, to which events are forwarded.
    pub(crate) ttrpc_address: Option<String>,
    /// containerd's executable: publishes events where there is no ttrpc socket.
    pub(crate) publish_binary: Option<PathBuf>,
    /// Bound, listening, non-blocking.
    pub(crate) listener: UnixListener,
    /// The listener's path, to unlink when the shim ends.
    pub(crate) socket: PathBuf,
    /// Open and locked for the shim's life: proves to `delete` that it is alive.
    pub(crate) pid_file: OwnedFd,
    /// The host's configuration.
    pub(crate) configuration: Configuration,
}

/// Runs the action that the command line names. On failure the reason is one line on standard error,
/// which containerd shows to its user.
pub(crate) fn main() -> ExitCode {
    let result = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Action::Version) => info::print_version().map_err(|error| error.to_string()),
        Ok(Action::Info) => info::print_info().map_err(|error| error.to_string()),
        Ok(Action::Start(target)) => bootstrap::start(&target).map_err(|error| error.to_string()),
        Ok(Action::Delete(bundle)) => delete::delete(bundle.as_deref()).map_err(|error| error.to_string()),
        Ok(Action::Serve(target, serve)) => {
            let socket = serve.socket.clone();
            match daemon::become_shim(target, serve) {
                Ok(context) => return serve::run(context),
                Err(error) => {
                    log::error(&error.to_string());
                    // containerd deletes nothing of a shim that it never spoke with.
                    let _ = std::fs::remove_file(socket);
                    Err(error.to_string())
                }
            }
        }
        Err(error) => Err(error.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{}", reason.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
