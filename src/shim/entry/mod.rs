//! The command line of a v2 shim and its actions.
//!
//! Belongs here: the actions that print one answer and exit (`start`, `delete`, `-info`, `-v`), the files and the
//! socket by which they find a running shim, and the set-up of the shim process. Does not belong here: the work of a
//! running shim. [`main`] is called for every command line that names no role of a child process.

mod arguments;
mod bootstrap;
mod configuration_source;
mod delete;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod group;
mod info;
mod options;
mod shim_process;
mod socket;
mod start_request;

#[cfg(any(test, fuzzing))]
pub use self::fuzz::parse_start_request;

use std::process::ExitCode;

use self::arguments::Action;
use super::api;

/// Runs the action of the command line. An error is one line on standard error, which containerd shows to its user.
pub(crate) fn main() -> ExitCode {
    let result = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Action::Version) => info::print_version().map_err(|error| format!("cannot print the version: {error}")),
        Ok(Action::Info) => info::print_info().map_err(|error| format!("cannot print the RuntimeInfo: {error}")),
        Ok(Action::Start(target)) => bootstrap::start(&target).map_err(|error| error.to_string()),
        Ok(Action::Delete(bundle)) => delete::delete(bundle.as_deref()).map_err(|error| error.to_string()),
        Ok(Action::Serve(target, socket)) => {
            match shim_process::become_shim(target, socket.clone()) {
                Ok(context) => return api::serve(context),
                Err(error) => {
                    log::error!("cannot start the shim: {error}");
                    // containerd cleans up only after shims that it has connected to.
                    let _ = std::fs::remove_file(socket);
                    Err(error.to_string())
                }
            }
        }
        Err(error) => Err(error.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
