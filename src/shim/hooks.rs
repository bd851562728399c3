//! Hooks of a spec that run on the host (OCI spec, "POSIX-platform Hooks"): each in turn, with the
//! container's state on its standard input.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

use rustix::fs::MemfdFlags;
use serde_json::json;

use super::child::{Child, Ended};
use crate::oci::{self, ContainerId, Hook};

/// How much of what a failed hook wrote goes into its error, in bytes.
const OUTPUT_LIMIT: u64 = 1024;

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("{moment} hook {}: {reason}", path.display())]
pub(crate) struct HookError {
    moment: &'static str,
    path: std::path::PathBuf,
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
    for hook in hooks {
        run_one(hook, &state, subject.bundle)
            .await
            .map_err(|reason| HookError {
                moment,
                path: hook.path.clone(),
                reason,
            })?;
    }
    Ok(())
}

/// OCI spec, "State".
fn state(status: &str, subject: Subject<'_>) -> String {
    // A spec that was planned can be read; without annotations a hook gets the rest.
    let annotations = oci::annotations(subject.bundle).unwrap_or_default();
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
    let text = |error: io::Error| error.to_string();
    // Files in memory, not pipes: nobody has to wait for a hook that does not read.
    let stdin = memory_file(state).map_err(text)?;
    let mut output = memory_file("").map_err(text)?;
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
        .stdout(output.try_clone().map_err(text)?)
        .stderr(output.try_clone().map_err(text)?)
        .spawn()
        .and_then(|child| Child::from_std(&child))
        .map_err(text)?;
    let ended = match hook.timeout {
        None => child.reap().await,
        Some(limit) => match tokio::time::timeout(limit, child.reap()).await {
            Ok(ended) => ended,
            Err(_) => {
                child.kill_and_reap();
                return Err(format!("did not end within {} s", limit.as_secs()));
            }
        },
    };
    match ended.map_err(text)? {
        Ended::Exited(0) => Ok(()),
        how => {
            let mut said = String::new();
            output.seek(SeekFrom::Start(0)).map_err(text)?;
            output.take(OUTPUT_LIMIT).read_to_string(&mut said).map_err(text)?;
            Err(format!("{how}: {}", said.trim()))
        }
    }
}

fn memory_file(text: &str) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
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
        let error = run_in(
            bundle.path(),
            &[shell("echo no network >&2; exit 3"), shell("touch second")],
        )
        .await
        .unwrap_err();
        assert_eq!(error, "createRuntime hook /bin/sh: exited with status 3: no network");
        assert!(!bundle.path().join("second").exists());

        let missing = Hook {
            path: "/no/such/hook".into(),
            ..shell("")
        };
        let error = run_in(bundle.path(), &[missing]).await.unwrap_err();
        assert!(error.starts_with("createRuntime hook /no/such/hook: "), "{error}");
    }

    #[tokio::test]
    async fn hook_over_its_time_is_killed() {
        let bundle = tempfile::tempdir().unwrap();
        let hook = Hook {
            timeout: Some(Duration::from_secs(1)),
            ..shell("echo $$ > pid; exec sleep 1000")
        };
        let error = run_in(bundle.path(), &[hook]).await.unwrap_err();
        assert_eq!(error, "createRuntime hook /bin/sh: did not end within 1 s");
        let pid = std::fs::read_to_string(bundle.path().join("pid")).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }
}
