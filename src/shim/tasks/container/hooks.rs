//! Hooks of a spec that run on the host (OCI spec, "POSIX-platform Hooks"): one after the other, with the
//! container's state on standard input. Error texts are runc's, because users search for them.

use std::{io, os::unix::process::CommandExt, path::Path, process::Command};

use nutshell_linux::{
    go_text::{error_text, signal_name},
    hook::{memory_file, output},
};
use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::oci::{self, ContainerId, Hook};
use crate::shim::{
    blocking,
    child::{Child, WaitStatus},
    descriptor_limit,
};

/// A hook that failed. `moment` is its name in the spec, `index` its position under that name.
#[derive(Debug, thiserror::Error)]
#[error("error running {moment} hook #{index}: {reason}")]
pub(crate) struct HookError {
    moment: &'static str,
    index: usize,
    reason: String,
}

/// The part of a container's state that its hooks receive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HookContainer<'a> {
    pub(crate) id: &'a ContainerId,
    /// Its bundle's folder, in which the hooks run.
    pub(crate) bundle: &'a Path,
    /// Its pid on the host, which is in the container's network namespace; 0 after it was freed.
    pub(crate) pid: u32,
}

/// Runs `hooks` in order. `moment` is their name in the spec, `status` that of the container (OCI spec, "State").
///
/// # Errors
///
/// The first hook that fails. Later hooks do not run then.
pub(crate) async fn run(
    moment: &'static str,
    hooks: &[Hook],
    status: &str,
    container: HookContainer<'_>,
) -> Result<(), HookError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = encode_state(status, container);
    for (index, hook) in hooks.iter().enumerate() {
        run_hook(hook, &state, container.bundle)
            .await
            .map_err(|reason| HookError { moment, index, reason })?;
    }
    Ok(())
}

/// Runs all of `hooks` in order and logs failures. For poststart and poststop, whose failures must not affect the
/// container (OCI spec, "Lifecycle").
pub(crate) async fn run_all(moment: &'static str, hooks: &[Hook], status: &str, container: HookContainer<'_>) {
    if hooks.is_empty() {
        return;
    }
    let state = encode_state(status, container);
    for (index, hook) in hooks.iter().enumerate() {
        if let Err(reason) = run_hook(hook, &state, container.bundle).await {
            let error = HookError { moment, index, reason };
            log::warn!("task {}: {error}", container.id);
        }
    }
}

/// The container's state as JSON (OCI spec, "State").
fn encode_state(status: &str, container: HookContainer<'_>) -> String {
    // The spec was readable when the container was planned. If it has been removed since, hooks get no annotations.
    let annotations = oci::read_annotations(container.bundle).unwrap_or_default();
    let mut state = json!({
        "ociVersion": "1.2.0",
        "id": container.id.as_str(),
        "status": status,
        "bundle": container.bundle,
        "annotations": annotations,
    });
    if container.pid > 0 {
        state["pid"] = json!(container.pid);
    }
    state.to_string()
}

async fn run_hook(hook: &Hook, state: &str, bundle: &Path) -> Result<(), String> {
    let text = |error: io::Error| error_text(&error);
    let stdin = memory_file(state).map_err(text)?;
    let stdout = memory_file("").map_err(text)?;
    let stderr = memory_file("").map_err(text)?;
    let (name, arguments) = match hook.arguments.split_first() {
        Some((name, arguments)) => (name.as_ref(), arguments),
        None => (hook.path.as_os_str(), [].as_slice()),
    };
    let environment = hook.environment.iter().filter_map(|variable| variable.split_once('='));
    let mut command = Command::new(&hook.path);
    command
        .arg0(name)
        .args(arguments)
        .env_clear()
        .envs(environment)
        .current_dir(bundle)
        .stdin(stdin)
        .stdout(stdout.try_clone().map_err(text)?)
        .stderr(stderr.try_clone().map_err(text)?)
        .process_group(0);
    descriptor_limit::restore_for(&mut command);
    // The start of a program on a hung file system does not return.
    let spawn = move || command.spawn().and_then(|child| Child::from_std(&child));
    let failed = |reason: String| format!("fork/exec {}: {reason}", hook.path.display());
    let child = blocking::run("start the hook", spawn)
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(text(error)))?;
    let ended = match hook.timeout {
        None => child.reap().await,
        Some(limit) => match tokio::time::timeout(limit, child.reap()).await {
            Ok(ended) => ended,
            Err(_) => {
                // Also kills the processes that the hook started. The group's id is not reused before the hook is
                // reaped.
                if let Some(group) = i32::try_from(child.pid()).ok().and_then(Pid::from_raw) {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                child.end("the hook").await;
                return Err(format!(
                    "hook ran past specified timeout of {:.1}s",
                    limit.as_secs_f64()
                ));
            }
        },
    };
    let how = match ended.map_err(text)? {
        WaitStatus::Exited(0) => return Ok(()),
        WaitStatus::Exited(status) => format!("exit status {status}"),
        WaitStatus::Killed(signal) => format!("signal: {}", signal_name(signal)),
    };
    let (stdout, stderr) = (output(stdout).map_err(text)?, output(stderr).map_err(text)?);
    Err(format!("{how}, stdout: {stdout}, stderr: {stderr}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nutshell_fixtures::HungVolume;

    use super::*;
    use crate::shim::blocking::tests::leaves_thread_free;

    fn shell(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            arguments: ["hook", "-c", script].map(str::to_owned).into(),
            environment: vec!["NAME=value with = in it".to_owned()],
            timeout: None,
        }
    }

    async fn run_in(bundle: &Path, hooks: &[Hook]) -> Result<(), String> {
        let id = "c1".parse().unwrap();
        let container = HookContainer {
            id: &id,
            bundle,
            pid: 7,
        };
        let result = run("createRuntime", hooks, "creating", container).await;
        result.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn hooks_run_in_order_with_state_and_environment() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(
            bundle.path().join("config.json"),
            r#"{"ociVersion":"1.0.0","annotations":{"nerdctl/x":"y"}}"#,
        )
        .unwrap();

        run_in(
            bundle.path(),
            &[
                shell("cat > state"),
                shell("echo \"$NAME $PATH $0\" > after; cat state >> after"),
            ],
        )
        .await
        .unwrap();

        let text = std::fs::read_to_string(bundle.path().join("after")).unwrap();
        let (first, state) = text.split_once('\n').unwrap();
        assert!(
            first.starts_with("value with = in it ") && first.ends_with(" hook"),
            "{first}"
        );
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["id"], "c1");
        assert_eq!(state["pid"], 7);
        assert_eq!(state["status"], "creating");
        assert_eq!(state["annotations"]["nerdctl/x"], "y");
    }

    #[tokio::test]
    async fn failure_names_the_hook_and_stops_the_later_ones() {
        let bundle = tempfile::tempdir().unwrap();
        for (script, expected) in [
            (
                "echo no network >&2; echo half; exit 3",
                "error running createRuntime hook #1: exit status 3, stdout: half, stderr: no network",
            ),
            (
                "kill -9 $$",
                "error running createRuntime hook #1: signal: killed, stdout: , stderr: ",
            ),
        ] {
            let error = run_in(bundle.path(), &[shell(""), shell(script), shell("touch third")])
                .await
                .unwrap_err();
            assert_eq!(error, expected);
            assert!(!bundle.path().join("third").exists());
        }

        let missing = Hook {
            path: "/no/such/hook".into(),
            ..shell("")
        };
        let error = run_in(bundle.path(), &[missing]).await.unwrap_err();
        assert_eq!(
            error,
            "error running createRuntime hook #0: fork/exec /no/such/hook: no such file or directory"
        );
    }

    #[tokio::test]
    async fn hook_on_a_hung_file_system_does_not_block_the_thread() {
        let bundle = tempfile::tempdir().unwrap();
        let volume = HungVolume::mount_temporary();
        let hook = Hook {
            path: volume.path().join("hook"),
            ..shell("")
        };
        assert!(leaves_thread_free(volume, run_in(bundle.path(), &[hook])).await);
    }

    #[tokio::test]
    async fn failing_poststop_hook_does_not_stop_the_next() {
        let bundle = tempfile::tempdir().unwrap();
        let id = "c1".parse().unwrap();
        let container = HookContainer {
            id: &id,
            bundle: bundle.path(),
            pid: 0,
        };
        run_all(
            "poststop",
            &[shell("exit 1"), shell("touch second")],
            "stopped",
            container,
        )
        .await;
        assert!(bundle.path().join("second").exists());
    }

    #[tokio::test]
    async fn hook_that_exceeds_its_timeout_is_killed_with_its_children() {
        let bundle = tempfile::tempdir().unwrap();
        let hook = Hook {
            timeout: Some(Duration::from_secs(1)),
            ..shell("sleep 1000 & echo $! > pid; wait")
        };
        let error = run_in(bundle.path(), &[hook]).await.unwrap_err();
        assert_eq!(
            error,
            "error running createRuntime hook #0: hook ran past specified timeout of 1.0s"
        );
        let pid = std::fs::read_to_string(bundle.path().join("pid")).unwrap();
        // The process may still be a zombie, until its new parent reaps it.
        let state = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
        assert!(!state.is_ok_and(|state| state.contains(") S ")));
    }
}
