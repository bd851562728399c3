//! A container from Create to the end of its shim, and its execs.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteResponse, ExecProcessRequest, Status};
use serde_json::Value;

use crate::{
    PATIENCE,
    bootstrap::Caller,
    bundle::{self, Bundle, process},
    containerd::{Containerd, Shim},
    host,
    stdio::Output,
    task::{Answer, Task, json_any},
};

/// SIGKILL.
pub const SIGKILL: u32 = 9;
/// SIGTERM.
pub const SIGTERM: u32 = 15;

/// A container that can be created: its shim serves, its fifos wait.
#[derive(Debug)]
pub struct Prepared<'c> {
    containerd: &'c Containerd,
    /// Its folder.
    pub bundle: Arc<Bundle>,
    /// Its shim.
    pub shim: Shim,
    /// What will be asked.
    pub request: CreateTaskRequest,
    /// Its standard output.
    pub stdout: Arc<Output>,
    /// Its standard error.
    pub stderr: Arc<Output>,
}

/// A container that was created.
#[derive(Debug)]
pub struct Container<'c> {
    containerd: &'c Containerd,
    /// Its id.
    pub id: String,
    /// Its folder.
    pub bundle: Arc<Bundle>,
    /// Its shim.
    pub shim: Shim,
    /// Its pid on the host.
    pub pid: u32,
    /// Its standard output.
    pub stdout: Arc<Output>,
    /// Its standard error.
    pub stderr: Arc<Output>,
}

/// An exec that was added.
#[derive(Debug)]
pub struct Exec<'c> {
    container: &'c Container<'c>,
    /// Its id.
    pub id: String,
    /// Its standard output.
    pub stdout: Arc<Output>,
}

impl Containerd {
    /// Makes ready all that Create needs, in a shim of the newest containerd.
    pub fn prepare(&self, spec: &Value) -> Prepared<'_> {
        let bundle = self.bundle(spec);
        let answer = self.start(&bundle, &Caller::newest()).unwrap();
        self.prepare_in(bundle, self.shim_at(answer))
    }

    /// Makes ready what Create needs beside the shim.
    pub fn prepare_in(&self, bundle: Arc<Bundle>, shim: Shim) -> Prepared<'_> {
        let (stdout, stderr) = (self.output("stdout"), self.output("stderr"));
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: bundle::bind(),
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

    /// A container that was created and not started.
    pub fn create(&self, spec: &Value) -> Container<'_> {
        self.prepare(spec).create().unwrap()
    }

    /// A container that runs.
    pub fn run(&self, spec: &Value) -> Container<'_> {
        let container = self.create(spec);
        container.start();
        container
    }
}

impl<'c> Prepared<'c> {
    /// Creates it.
    ///
    /// # Errors
    ///
    /// The shim's.
    pub fn create(self) -> Answer<Container<'c>> {
        let pid = self.shim.task.create(&self.request)?;
        assert!(host::is_alive(pid), "the pid {pid} is no living process");
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

    /// What containerd does after a Create that failed: the shim ends and leaves nothing.
    pub fn abandon(&self) {
        let _ = self.shim.task.shutdown(&self.bundle.id, false);
        assert!(
            host::ends_within(self.shim.pid, PATIENCE),
            "the shim goes on without a container"
        );
        self.containerd.delete_answer(&self.bundle);
        self.bundle.remove();
    }
}

impl<'c> Container<'c> {
    /// Calls about it.
    pub fn task(&self) -> &Task {
        &self.shim.task
    }

    /// The stand-in that it belongs to.
    pub fn containerd(&self) -> &'c Containerd {
        self.containerd
    }

    /// Starts it.
    pub fn start(&self) {
        assert_eq!(self.task().start(&self.id, "").unwrap(), self.pid);
    }

    /// Its status, and that of an exec.
    pub fn status(&self, exec: &str) -> Status {
        self.task().state(&self.id, exec).unwrap().status.enum_value().unwrap()
    }

    /// Kills it.
    pub fn kill(&self, signal: u32) {
        self.task().kill(&self.id, "", signal).unwrap();
    }

    /// Waits for its end: the status.
    pub fn wait(&self) -> u32 {
        self.task().wait(&self.id, "").unwrap().exit_status
    }

    /// Adds an exec.
    pub fn exec(&self, args: &[&str]) -> Exec<'_> {
        let (mut request, stdout) = self.exec_request(args);
        request.exec_id = self.containerd.new_name("e");
        self.task().exec(&request).unwrap();
        Exec {
            container: self,
            id: request.exec_id,
            stdout,
        }
    }

    /// What adds an exec, without an id; standard error goes with standard output.
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

    /// Runs a shell script as an exec and returns its status and output.
    pub fn script(&self, script: &str) -> (u32, String) {
        let exec = self.exec(&["sh", "-c", script]);
        exec.start();
        let status = exec.wait();
        let output = exec.stdout.all();
        exec.delete();
        (status, output)
    }

    /// The output of a shell script that succeeds.
    pub fn output_of(&self, script: &str) -> String {
        let (status, output) = self.script(script);
        assert_eq!(status, 0, "{script}: {output}");
        output
    }

    /// Deletes it, and no more.
    pub fn delete(&self) -> DeleteResponse {
        self.task().delete(&self.id, "").unwrap()
    }

    /// All that containerd does to remove one container of a shim that others need: kills it if it
    /// lives, deletes it, calls `delete`, removes the bundle.
    pub fn remove(&self) -> DeleteResponse {
        if self.status("") != Status::STOPPED {
            self.kill(SIGKILL);
            self.wait();
        }
        let deleted = self.delete();
        self.containerd
            .events
            .until(&self.id, &format!("delete {}", deleted.exit_status));
        deleted
    }

    /// As [`Self::remove`], and then the end of the shim, which has no other container.
    pub fn end(self) {
        let deleted = self.remove();
        self.task().shutdown(&self.id, false).unwrap();
        assert!(
            host::ends_within(self.shim.pid, Duration::from_secs(10)),
            "the shim goes on after Shutdown"
        );
        let answer = self.containerd.delete_answer(&self.bundle);
        assert_eq!(
            (answer.pid, answer.exit_status),
            (deleted.pid, deleted.exit_status),
            "delete answers something else than the task did"
        );
        self.bundle.remove();
    }
}

impl Exec<'_> {
    /// Starts it: its pid.
    pub fn start(&self) -> u32 {
        let container = self.container;
        let pid = container.task().start(&container.id, &self.id).unwrap();
        assert!(host::is_alive(pid), "the pid {pid} is no living process");
        pid
    }

    /// Its status.
    pub fn status(&self) -> Status {
        self.container.status(&self.id)
    }

    /// Waits for its end: the status.
    pub fn wait(&self) -> u32 {
        self.container
            .task()
            .wait(&self.container.id, &self.id)
            .unwrap()
            .exit_status
    }

    /// Signals it.
    pub fn kill(&self, signal: u32) {
        self.container
            .task()
            .kill(&self.container.id, &self.id, signal)
            .unwrap();
    }

    /// Deletes it.
    pub fn delete(&self) -> DeleteResponse {
        self.container.task().delete(&self.container.id, &self.id).unwrap()
    }
}
