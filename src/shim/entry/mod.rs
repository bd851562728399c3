//! The command line of a v2 shim, and what each of its actions does.
//!
//! What lives here: the actions that print one answer and exit (`start`, `delete`, `-info`, `-v`), the files and
//! the socket by which they find a running shim, and the step from `start` to the daemon. What may not live
//! here: anything that a running shim does for its containers. [`main`] is called for every command line that
//! names no child process's role.

mod arguments;
mod bootstrap;
mod configuration_source;
mod daemon;
mod delete;
mod group;
mod info;
mod options;
mod socket;
mod start_request;

use std::process::ExitCode;

use self::arguments::Action;
use super::api;

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
                Ok(context) => return api::serve(context),
                Err(error) => {
                    log::error!("{error}");
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
