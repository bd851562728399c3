//! Hooks that run in the container's namespaces, in runc's words where one fails (OCI spec,
//! "POSIX-platform Hooks").
//!
//! The machine has no programs of its own, so the image's are run: a `startContainer` hook by the first
//! process where it is about to become the container's program, a `createContainer` hook in the root
//! file system, once that is mounted and before the first process is shut into it. libcontainer calls
//! for the latter, and is given the agent itself to run ([`run_in_rootfs`]).

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use nutshell_linux::go_text::{error_text, signal_name};
use nutshell_linux::hook::{memory_file, output};
use oci_spec::runtime::{Hook, HookBuilder};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::diagnosis::CauseWriter;

/// The agent's first argument where it is to run `createContainer` hooks.
pub(crate) const HOOKS_FLAG: &str = "--create-container-hooks";

/// Stands in for all of `hooks`: the agent, told what to run where, and where to say what went wrong.
pub(super) fn agent_as_hook(hooks: &[Hook], rootfs: &Path, words: &CauseWriter) -> Result<Hook, String> {
    let list = serde_json::to_string(hooks).map_err(|error| format!("encode the createContainer hooks: {error}"))?;
    let words = words
        .share_with_programs()
        .map_err(|error| format!("share a pipe: {error}"))?;
    HookBuilder::default()
        .path("/proc/self/exe")
        .args(
            [
                "nutshell-agent",
                HOOKS_FLAG,
                &list,
                &rootfs.to_string_lossy(),
                &words.to_string(),
            ]
            .map(str::to_owned)
            .to_vec(),
        )
        .build()
        .map_err(|error| error.to_string())
}

/// Runs what [`agent_as_hook`] says: `arguments` are those behind [`HOOKS_FLAG`]. The container's state is on
/// standard input.
pub(crate) fn run_in_rootfs(arguments: &[OsString]) -> ExitCode {
    let [list, rootfs, words] = arguments else {
        return ExitCode::from(2);
    };
    let Some(words) = words
        .to_str()
        .and_then(|number| CauseWriter::from_inherited(number.parse().ok()?))
    else {
        return ExitCode::from(2);
    };
    let enter = || -> Result<(Vec<Hook>, String), String> {
        let mut state = String::new();
        io::stdin()
            .read_to_string(&mut state)
            .map_err(|error| format!("read the container's state: {error}"))?;
        let hooks = serde_json::from_slice(list.as_encoded_bytes()).map_err(|error| error.to_string())?;
        rustix::process::chroot(Path::new(rootfs))
            .and_then(|()| rustix::process::chdir("/"))
            .map_err(|error| format!("enter {}: {error}", rootfs.display()))?;
        Ok((hooks, state))
    };
    match enter().and_then(|(hooks, state)| run("createContainer", &hooks, &state)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            words.write_verbatim(&reason);
            ExitCode::FAILURE
        }
    }
}

/// Runs `hooks` in their order up to the first that fails, each with `state` on its standard input.
pub(super) fn run(moment: &str, hooks: &[Hook], state: &str) -> Result<(), String> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, state).map_err(|reason| format!("error running {moment} hook #{index}: {reason}"))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &str) -> Result<(), String> {
    let text = |error: io::Error| error_text(&error);
    let stdin = memory_file(state).map_err(text)?;
    let stdout = memory_file("").map_err(text)?;
    let stderr = memory_file("").map_err(text)?;
    let arguments = hook.args().as_deref().unwrap_or_default();
    let (name, arguments) = match arguments.split_first() {
        Some((name, arguments)) => (OsStr::new(name), arguments),
        None => (hook.path().as_os_str(), [].as_slice()),
    };
    let environment = hook.env().iter().flatten().filter_map(|entry| entry.split_once('='));
    let mut child = Command::new(hook.path())
        .arg0(name)
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(stdin)
        .stdout(stdout.try_clone().map_err(text)?)
        .stderr(stderr.try_clone().map_err(text)?)
        .process_group(0)
        .spawn()
        .map_err(|error| format!("fork/exec {}: {}", hook.path().display(), error_text(&error)))?;
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let status = wait_with_timeout(&mut child, limit.map(Duration::from_secs))?;
    if status.success() {
        return Ok(());
    }
    let how = match status.code() {
        Some(code) => format!("exit status {code}"),
        None => format!("signal: {}", signal_name(status.signal().unwrap_or_default())),
    };
    let (stdout, stderr) = (output(stdout).map_err(text)?, output(stderr).map_err(text)?);
    Err(format!("{how}, stdout: {stdout}, stderr: {stderr}"))
}

/// Waits for the child's end, and kills it where that takes longer than `limit`.
fn wait_with_timeout(child: &mut Child, limit: Option<Duration>) -> Result<ExitStatus, String> {
    if let Some(limit) = limit
        && !has_ended_within(child, limit).map_err(|error| error_text(&error))?
    {
        // With all that it has started. It may have ended in this moment: the result is the same.
        let _ = pid_of(child).map(|group| rustix::process::kill_process_group(group, Signal::KILL));
        let _ = child.wait();
        return Err(format!(
            "hook ran past specified timeout of {:.1}s",
            limit.as_secs_f64()
        ));
    }
    child.wait().map_err(|error| error_text(&error))
}

fn has_ended_within(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(pid_of(child)?, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut poll = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&limit)))? > 0)
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    Ok(Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::InvalidInput)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Option<i64>) -> Hook {
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["A=b=c"], "timeout": timeout});
        serde_json::from_value(hook).unwrap()
    }

    #[test]
    fn hooks_run_in_order_with_state_environment_and_name() {
        let file = std::env::temp_dir().join(format!("agent-hooks-{}", std::process::id()));
        let script = format!(
            "echo $0 $A; cat; echo >&2; test $A = b=c && echo $0 >>{}",
            file.display()
        );
        run("x", &[shell(&script, None), shell(&script, Some(60))], "{}").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "hook\nhook\n");
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn failure_is_told_in_runcs_words_and_stops_the_rest() {
        let missing = HookBuilder::default().path("/no/such").build().unwrap();
        for (hook, expected) in [
            (
                shell("echo a; echo b >&2; exit 3", None),
                "exit status 3, stdout: a, stderr: b",
            ),
            (shell("kill -9 $$", Some(60)), "signal: killed, stdout: , stderr: "),
            (
                shell("exec sleep 1000", Some(1)),
                "hook ran past specified timeout of 1.0s",
            ),
            (missing, "fork/exec /no/such: no such file or directory"),
        ] {
            let error = run("moment", &[shell("", None), hook, shell("exit 77", None)], "{}").unwrap_err();
            assert_eq!(error, format!("error running moment hook #1: {expected}"));
        }
    }
}
