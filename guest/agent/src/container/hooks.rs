//! Runs the hooks that belong in the container's namespaces (OCI runtime spec, "POSIX-platform Hooks"). Error texts are
//! runc's.
//!
//! The guest contains no programs except the agent, so the paths of hooks are paths in the container's root file
//! system. The first process runs `startContainer` hooks just before it executes the container's program.
//! `createContainer` hooks run after the root file system is mounted and before the first process enters it.
//! libcontainer executes those: the agent passes itself as the hook, and changes its root and drops capabilities before
//! it runs them ([`run_in_rootfs`]), because the hook's program comes from the image, and the agent's files are still
//! mounted.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use libcontainer::capabilities;
use libcontainer::syscall::syscall::SyscallType;
use nutshell_linux::go_text::{error_text, signal_name};
use nutshell_linux::hook::{memory_file, output};
use oci_spec::runtime::{Capability, Hook, HookBuilder, LinuxCapabilities};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::diagnosis::CauseWriter;

/// The first argument of the agent when libcontainer executes it as a `createContainer` hook.
pub(crate) const HOOKS_FLAG: &str = "--create-container-hooks";

/// Capabilities by which a hook could leave its root directory, or open devices that the container's device rules deny:
/// the rules apply only after these hooks.
const CONFINED: [Capability; 2] = [Capability::SysChroot, Capability::Mknod];

/// Returns a hook that executes the agent, which runs `hooks` in `rootfs` and writes the error to `causes`. They have
/// the `capabilities` of the container, without those of [`CONFINED`] unless the container is privileged.
pub(super) fn agent_as_hook(
    hooks: &[Hook],
    rootfs: &Path,
    mut capabilities: LinuxCapabilities,
    causes: &CauseWriter,
) -> Result<Hook, String> {
    let mut bounding = capabilities.bounding().clone().unwrap_or_default();
    if !bounding.contains(&Capability::SysAdmin) {
        for capability in CONFINED {
            bounding.remove(&capability);
        }
    }
    capabilities
        .set_effective(Some(bounding.clone()))
        .set_permitted(Some(bounding.clone()))
        .set_bounding(Some(bounding));
    let list = serde_json::to_string(&(hooks, capabilities))
        .map_err(|error| format!("encode the createContainer hooks: {error}"))?;
    let descriptor = causes
        .share_with_programs()
        .map_err(|error| format!("share the pipe for error causes: {error}"))?;
    HookBuilder::default()
        .path("/proc/self/exe")
        .args(
            [
                "nutshell-agent",
                HOOKS_FLAG,
                &list,
                &rootfs.to_string_lossy(),
                &descriptor.to_string(),
            ]
            .map(str::to_owned)
            .to_vec(),
        )
        .build()
        .map_err(|error| format!("describe the agent as a createContainer hook: {error}"))
}

/// Runs `createContainer` hooks: the main function of the agent when it is the hook of [`agent_as_hook`]. `arguments`
/// are those after [`HOOKS_FLAG`], standard input is the container's state.
pub(crate) fn run_in_rootfs(arguments: &[OsString]) -> ExitCode {
    let [list, rootfs, descriptor] = arguments else {
        return ExitCode::from(2);
    };
    let Some(causes) = descriptor
        .to_str()
        .and_then(|number| CauseWriter::from_inherited(number.parse().ok()?))
    else {
        return ExitCode::from(2);
    };
    let enter_rootfs = || -> Result<(Vec<Hook>, String), String> {
        let mut state = String::new();
        io::stdin()
            .read_to_string(&mut state)
            .map_err(|error| format!("read the container's state: {error}"))?;
        let (hooks, wanted): (_, LinuxCapabilities) = serde_json::from_slice(list.as_encoded_bytes())
            .map_err(|error| format!("parse the createContainer hooks: {error}"))?;
        rustix::process::chroot(Path::new(rootfs))
            .and_then(|()| rustix::process::chdir("/"))
            .map_err(|error| format!("enter {}: {error}", rootfs.display()))?;
        capabilities::drop_privileges(&wanted, &*SyscallType::Linux.create_syscall())
            .map_err(|error| format!("set the capabilities: {error}"))?;
        Ok((hooks, state))
    };
    match enter_rootfs().and_then(|(hooks, state)| run("createContainer", &hooks, &state)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            causes.write_verbatim(&error);
            ExitCode::FAILURE
        }
    }
}

/// Runs `hooks` in order, up to the first that fails. Each gets `state` on standard input. `kind` is their name in the
/// spec.
pub(super) fn run(kind: &str, hooks: &[Hook], state: &str) -> Result<(), String> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, state).map_err(|error| format!("error running {kind} hook #{index}: {error}"))?;
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
    let timeout = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let status = wait_with_timeout(&mut child, timeout.map(Duration::from_secs))?;
    if status.success() {
        return Ok(());
    }
    let cause = match status.code() {
        Some(code) => format!("exit status {code}"),
        None => format!("signal: {}", signal_name(status.signal().unwrap_or_default())),
    };
    let (stdout, stderr) = (output(stdout).map_err(text)?, output(stderr).map_err(text)?);
    Err(format!("{cause}, stdout: {stdout}, stderr: {stderr}"))
}

/// Waits for the child to end, and kills it after `timeout`.
fn wait_with_timeout(child: &mut Child, timeout: Option<Duration>) -> Result<ExitStatus, String> {
    if let Some(timeout) = timeout
        && !has_ended_within(child, timeout).map_err(|error| error_text(&error))?
    {
        // Kills the whole process group. If the hook has just ended, the result is the same.
        let _ = pid_of(child).map(|group| rustix::process::kill_process_group(group, Signal::KILL));
        let _ = child.wait();
        return Err(format!(
            "hook ran past specified timeout of {:.1}s",
            timeout.as_secs_f64()
        ));
    }
    child.wait().map_err(|error| error_text(&error))
}

fn has_ended_within(child: &Child, timeout: Duration) -> io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(pid_of(child)?, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    let mut poll = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&timeout)))? > 0)
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
    fn failure_has_runcs_text_and_prevents_later_hooks() {
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
            let error = run("kind", &[shell("", None), hook, shell("exit 77", None)], "{}").unwrap_err();
            assert_eq!(error, format!("error running kind hook #1: {expected}"));
        }
    }
}
