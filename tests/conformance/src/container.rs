//! Containers from Create to the end of their shim, and their execs.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteResponse, ExecProcessRequest, Status};
use serde_json::Value;

use crate::{
    TIMEOUT,
    bootstrap::Caller,
    bundle::{self, Bundle, process},
    fake_containerd::{FakeContainerd, Shim},
    host,
    stdio::Output,
    task::{CallResult, TaskClient, json_any},
};

/// The signal number of SIGKILL.
pub const SIGKILL: u32 = 9;
/// The signal number of SIGTERM.
pub const SIGTERM: u32 = 15;

/// A container that is ready for Create: its shim serves and its fifos exist.
#[derive(Debug)]
pub struct Prepared<'c> {
    containerd: &'c FakeContainerd,
    /// The bundle for the Create request.
    pub bundle: Arc<Bundle>,
    /// The shim whose address `start` printed.
    pub shim: Shim,
    /// The Create request, which a test may change.
    pub request: CreateTaskRequest,
    /// Its standard output.
    pub stdout: Arc<Output>,
    /// Its standard error.
    pub stderr: Arc<Output>,
}

/// A container after Create.
#[derive(Debug)]
pub struct Container<'c> {
    containerd: &'c FakeContainerd,
    /// The id in every request.
    pub id: String,
    /// The bundle of the Create request.
    pub bundle: Arc<Bundle>,
    /// The shim that serves the container.
    pub shim: Shim,
    /// Its pid on the host.
    pub pid: u32,
    /// Its standard output.
    pub stdout: Arc<Output>,
    /// Its standard error.
    pub stderr: Arc<Output>,
}

/// An exec of a container, after the Exec call.
#[derive(Debug)]
pub struct Exec<'c> {
    container: &'c Container<'c>,
    /// The id of the exec in every request.
    pub id: String,
    /// Its standard output.
    pub stdout: Arc<Output>,
    /// Its standard error.
    pub stderr: Arc<Output>,
}

impl FakeContainerd {
    /// Prepares a container in a new shim, as the newest containerd does.
    pub fn prepare(&self, spec: &Value) -> Prepared<'_> {
        let bundle = self.bundle(spec);
        let answer = self.start(&bundle, &Caller::newest()).unwrap();
        self.prepare_in(bundle, self.connect_shim(answer))
    }

    /// Prepares a container in this shim.
    pub fn prepare_in(&self, bundle: Arc<Bundle>, shim: Shim) -> Prepared<'_> {
        let (stdout, stderr) = (self.output("stdout"), self.output("stderr"));
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: bundle::rootfs_mounts(),
            stdout: stdout.path().display().to_string(),
            stderr: stderr.path().display().to_string(),
            ..CreateTaskRequest::default()
        };
        Prepared {
            containerd: self,
            bundle,
            shim,
            request,
            stdout,
            stderr,
        }
    }

    /// Creates a container in a new shim.
    pub fn create(&self, spec: &Value) -> Container<'_> {
        self.prepare(spec).create().unwrap()
    }

    /// Creates and starts a container in a new shim.
    pub fn run(&self, spec: &Value) -> Container<'_> {
        let container = self.create(spec);
        container.start();
        container
    }
}

impl<'c> Prepared<'c> {
    /// Calls Create, and asserts that the pid is that of a living process.
    ///
    /// # Errors
    ///
    /// The error of Create.
    pub fn create(self) -> CallResult<Container<'c>> {
        let pid = self.shim.task.create(&self.request)?;
        assert!(host::is_alive(pid), "no process with the pid {pid}");
        Ok(Container {
            containerd: self.containerd,
            id: self.bundle.id.clone(),
            bundle: self.bundle,
            shim: self.shim,
            pid,
            stdout: self.stdout,
            stderr: self.stderr,
        })
    }

    /// Does what containerd does after a failed Create: shuts the shim down, calls `delete`, and removes the bundle.
    pub fn abandon(&self) {
        let _ = self.shim.task.shutdown(&self.bundle.id, false);
        assert!(
            host::ends_within(self.shim.pid, TIMEOUT),
            "the shim still runs after a failed Create"
        );
        self.containerd.delete_bundle(&self.bundle);
        self.bundle.remove();
    }
}

impl<'c> Container<'c> {
    /// The client for Task calls.
    pub fn task(&self) -> &TaskClient {
        &self.shim.task
    }

    /// The containerd that it belongs to.
    pub fn containerd(&self) -> &'c FakeContainerd {
        self.containerd
    }

    /// Panics if the call fails.
    pub fn start(&self) {
        assert_eq!(self.task().start(&self.id, "").unwrap(), self.pid);
    }

    /// The status of an exec; of the container if `exec` is empty.
    pub fn status(&self, exec: &str) -> Status {
        self.task().state(&self.id, exec).unwrap().status.enum_value().unwrap()
    }

    /// Sends a signal to the container's process.
    pub fn kill(&self, signal: u32) {
        self.task().kill(&self.id, "", signal).unwrap();
    }

    /// Waits for the exit and returns the exit status.
    pub fn wait(&self) -> u32 {
        self.task().wait(&self.id, "").unwrap().exit_status
    }

    /// Adds an exec with a new id, which is not started yet.
    pub fn exec(&self, args: &[&str]) -> Exec<'_> {
        let (mut request, stdout) = self.exec_request(args);
        let stderr = self.containerd.output("exec-stderr");
        request.stderr = stderr.path().display().to_string();
        request.exec_id = self.containerd.new_name("e");
        self.task().exec(&request).unwrap();
        Exec {
            container: self,
            id: request.exec_id,
            stdout,
            stderr,
        }
    }

    /// An Exec request without an id, and the standard output of the process. It has no standard error.
    pub fn exec_request(&self, args: &[&str]) -> (ExecProcessRequest, Arc<Output>) {
        let stdout = self.containerd.output("exec");
        let request = ExecProcessRequest {
            id: self.id.clone(),
            stdout: stdout.path().display().to_string(),
            spec: Some(json_any("Process", &process(args))).into(),
            ..ExecProcessRequest::default()
        };
        (request, stdout)
    }

    /// Runs a shell script as an exec and returns its exit status, its standard output and its standard error.
    pub fn run_script_with_errors(&self, script: &str) -> (u32, String, String) {
        let exec = self.exec(&["sh", "-c", script]);
        exec.start();
        let status = exec.wait();
        let (output, errors) = (exec.stdout.read_to_end(), exec.stderr.read_to_end());
        exec.delete();
        (status, output, errors)
    }

    /// Runs a shell script as an exec and returns its exit status and its standard output.
    pub fn run_script(&self, script: &str) -> (u32, String) {
        let (status, output, _) = self.run_script_with_errors(script);
        (status, output)
    }

    /// Runs a shell script as an exec, asserts that it succeeds, and returns its standard output.
    pub fn output_of(&self, script: &str) -> String {
        let (status, output, errors) = self.run_script_with_errors(script);
        assert_eq!(status, 0, "{script}: {output}{errors}");
        output
    }

    /// Panics if the call fails.
    pub fn delete(&self) -> DeleteResponse {
        self.task().delete(&self.id, "").unwrap()
    }

    /// Kills the container if it has not ended, and deletes it. Returns after the delete event. The shim stays.
    pub fn remove(&self) -> DeleteResponse {
        if self.status("") != Status::STOPPED {
            self.kill(SIGKILL);
            self.wait();
        }
        let deleted = self.delete();
        self.containerd
            .events
            .wait_for(&self.id, &format!("delete {}", deleted.exit_status));
        deleted
    }

    /// Removes the container, which must be the last one of its shim: as [`Self::remove`], then shuts the shim down,
    /// calls `delete`, and removes the bundle.
    pub fn end(self) {
        let deleted = self.remove();
        self.task().shutdown(&self.id, false).unwrap();
        assert!(
            host::ends_within(self.shim.pid, Duration::from_secs(10)),
            "the shim still runs after Shutdown"
        );
        let answer = self.containerd.delete_bundle(&self.bundle);
        assert_eq!(
            (answer.pid, answer.exit_status),
            (deleted.pid, deleted.exit_status),
            "the answers of `delete` and of Delete differ"
        );
        self.bundle.remove();
    }
}

impl Exec<'_> {
    /// Calls Start and returns the pid.
    pub fn start(&self) -> u32 {
        let container = self.container;
        let pid = container.task().start(&container.id, &self.id).unwrap();
        assert!(host::is_alive(pid), "no process with the pid {pid}");
        pid
    }

    /// From the response to State.
    pub fn status(&self) -> Status {
        self.container.status(&self.id)
    }

    /// Waits for the exit and returns the exit status.
    pub fn wait(&self) -> u32 {
        self.container
            .task()
            .wait(&self.container.id, &self.id)
            .unwrap()
            .exit_status
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: u32) {
        self.container
            .task()
            .kill(&self.container.id, &self.id, signal)
            .unwrap();
    }

    /// Panics if the call fails.
    pub fn delete(&self) -> DeleteResponse {
        self.container.task().delete(&self.container.id, &self.id).unwrap()
    }
}
