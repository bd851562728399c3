//! Hooks of a spec that run on the host (OCI spec, "POSIX-platform Hooks"): each in turn, with the
//! container's state on its standard input. What fails is told in runc's words.

use std::{io, os::unix::process::CommandExt, path::Path, process::Command};

use nutshell_linux::{
    go_text::{error_text, signal_name},
    hook::{memory_file, output},
};
use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::oci::{self, ContainerId, Hook};
use crate::shim::child::{Child, WaitStatus};

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("error running {moment} hook #{index}: {reason}")]
pub(crate) struct HookError {
    moment: &'static str,
    index: usize,
    reason: String,
}

/// The container that hooks are told of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    /// Its id.
    pub(crate) id: &'a ContainerId,
    /// Its folder, in which the hooks run.
    pub(crate) bundle: &'a Path,
    /// Its pid on the host, whose network namespace is the container's; 0 if it has none any more.
    pub(crate) pid: u32,
}

/// Runs `hooks` in their order up to the first that fails. `moment` is their name in the spec,
/// `status` the container's.
pub(crate) async fn run(
    moment: &'static str,
    hooks: &[Hook],
    status: &str,
    subject: Subject<'_>,
) -> Result<(), HookError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = state(status, subject);
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, &state, subject.bundle)
            .await
            .map_err(|reason| HookError { moment, index, reason })?;
    }
    Ok(())
}

/// Runs all of `hooks` in their order and logs which failed: those for which a container's life goes
/// on as if they had not (OCI spec, "Lifecycle", poststart and poststop).
pub(crate) async fn run_all(moment: &'static str, hooks: &[Hook], status: &str, subject: Subject<'_>) {
    if hooks.is_empty() {
        return;
    }
    let state = state(status, subject);
    for (index, hook) in hooks.iter().enumerate() {
        if let Err(reason) = run_one(hook, &state, subject.bundle).await {
            let error = HookError { moment, index, reason };
            log::warn!("task {}: {error}", subject.id);
        }
    }
}

/// OCI spec, "State".
fn state(status: &str, subject: Subject<'_>) -> String {
    // A spec that was planned can be read; without annotations a hook gets the rest.
    let annotations = oci::read_annotations(subject.bundle).unwrap_or_default();
    let mut state = json!({
        "ociVersion": "1.2.0",
        "id": subject.id.as_str(),
        "status": status,
        "bundle": subject.bundle,
        "annotations": annotations,
    });
    if subject.pid > 0 {
        state["pid"] = json!(subject.pid);
    }
    state.to_string()
}

async fn run_one(hook: &Hook, state: &str, bundle: &Path) -> Result<(), String> {
    let text = |error: io::Error| error_text(&error);
    let stdin = memory_file(state).map_err(text)?;
    let stdout = memory_file("").map_err(text)?;
    let stderr = memory_file("").map_err(text)?;
    let (name, arguments) = match hook.arguments.split_first() {
        Some((name, arguments)) => (name.as_ref(), arguments),
        None => (hook.path.as_os_str(), [].as_slice()),
    };
    let environment = hook.environment.iter().filter_map(|variable| variable.split_once('='));
    let child = Command::new(&hook.path)
        .arg0(name)
        .args(arguments)
        .env_clear()
        .envs(environment)
        .current_dir(bundle)
        .stdin(stdin)
        .stdout(stdout.try_clone().map_err(text)?)
        .stderr(stderr.try_clone().map_err(text)?)
        .process_group(0)
        .spawn()
        .and_then(|child| Child::from_std(&child))
        .map_err(|error| format!("fork/exec {}: {}", hook.path.display(), text(error)))?;
    let ended = match hook.timeout {
        None => child.reap().await,
        Some(limit) => match tokio::time::timeout(limit, child.reap()).await {
            Ok(ended) => ended,
            Err(_) => {
                // With all that it has started: the group has its number until it is reaped.
                if let Some(group) = i32::try_from(child.pid()).ok().and_then(Pid::from_raw) {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                child.kill_and_reap();
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

    use super::*;

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
        let subject = Subject {
            id: &id,
            bundle,
            pid: 7,
        };
        let result = run("createRuntime", hooks, "creating", subject).await;
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
    async fn failure_names_the_hook_and_stops_the_rest() {
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
    async fn hooks_that_must_all_run_do_although_one_fails() {
        let bundle = tempfile::tempdir().unwrap();
        let id = "c1".parse().unwrap();
        let subject = Subject {
            id: &id,
            bundle: bundle.path(),
            pid: 0,
        };
        run_all(
            "poststop",
            &[shell("exit 1"), shell("touch second")],
            "stopped",
            subject,
        )
        .await;
        assert!(bundle.path().join("second").exists());
    }

    #[tokio::test]
    async fn hook_over_its_time_is_killed() {
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
        // Whoever inherits it reaps it in its own time.
        let state = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
        assert!(!state.is_ok_and(|state| state.contains(") S ")));
    }
}
