//! The job that runs a process in the guest itself, outside of all containers. The agent uses it when it is a service
//! of a user's system.
//!
//! The process is what a login of its user would start: it has the namespaces and the cgroup of the agent. Settings for
//! containers in the request, such as capabilities, limits and the seccomp filter, are not applied.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use nutshell_protocol::{Failure, StartExec};
use oci_spec::runtime::{Process, User};
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Signal, Uid};

use super::exec::{Describe, Streams, await_program, begin_session, enter_directory, open_terminal};
use super::program::{Program, ResolvedProgram};
use crate::failure::{Context, FailureExt};
use crate::job::Outcome;
use crate::stdio::ProcessEnds;
use crate::sys;

/// Starts the process. Returns it and the master of its terminal.
pub(crate) fn start(request: &StartExec, process_ends: &ProcessEnds) -> Result<(Outcome, Option<OwnedFd>), Failure> {
    let process: Process = serde_json::from_slice(&request.process)
        .map_err(|error| Failure::invalid(format!("cannot parse the exec's process: {error}")))?;
    let program = Program::of(&process)?;
    process_ends
        .set_owner(program.uid)
        .context(|| "set the owner of the standard streams".to_owned())?;
    let terminal = request
        .stdio
        .terminal
        .then(|| open_terminal(request.stdio.size, program.uid))
        .transpose()
        .context(|| "open a terminal of the file system devpts at /dev/pts".to_owned())?;
    let slave = terminal.as_ref().map(|(_, slave)| slave);
    let (error_reader, error_writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .context(|| "open the pipe for an error of the process".to_owned())?;
    let forked = sys::fork_plain_sibling().context(|| format!("fork exec {}", request.exec))?;
    let Some(pid) = forked else {
        let streams = Streams::of(process_ends, slave, None);
        let Err(error) = become_program(&program, process.user(), &streams, &error_writer);
        let _ = rustix::io::write(&error_writer, error.as_bytes());
        sys::exit_now(255)
    };
    drop(error_writer);
    await_program(error_reader, request)?;
    let outcome = Outcome::Process { pid: sys::raw_pid(pid) };
    Ok((outcome, terminal.map(|(master, _)| master)))
}

/// Turns the forked process into the program.
fn become_program(
    program: &Program,
    user: &User,
    streams: &Streams<'_>,
    error_writer: &OwnedFd,
) -> Result<Infallible, String> {
    begin_session(streams)?;
    sys::close_all_but(&[error_writer.as_fd()]);
    // The agent may be protected from the OOM killer, and the process must not inherit that.
    fs::write("/proc/self/oom_score_adj", "0").describe(|| "set oom_score_adj to 0".to_owned())?;
    // Enter the directory as root first, as for a container.
    let chdir_result = enter_directory(&program.cwd);
    become_user(user)?;
    // After the change of the user, because that clears this setting.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .describe(|| "set the parent-death signal".to_owned())?;
    chdir_result
        .or_else(|_| enter_directory(&program.cwd))
        .map_err(|error| format!("chdir to {}: {error}", program.cwd.display()))?;
    Err(ResolvedProgram::find(program)?.execute())
}

/// Switches to the user and groups, unless the process has them. A user other than root loses all capabilities.
fn become_user(user: &User) -> Result<(), String> {
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    let additional: Vec<_> = user
        .additional_gids()
        .iter()
        .flatten()
        .copied()
        .map(Gid::from_raw)
        .collect();
    if rustix::process::geteuid() == uid && rustix::process::getegid() == gid && additional.is_empty() {
        return Ok(());
    }
    rustix::thread::set_thread_groups(&additional)
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .describe(|| format!("become user {}:{}", user.uid(), user.gid()))
}
