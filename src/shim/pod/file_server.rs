//! The file server process of a running pod.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;

use super::{error::PodError, launcher::Launcher};
use crate::{
    oci::ContainerId,
    shim::{
        blocking::{self, FILE_SYSTEM_LIMIT},
        child::{Child, WaitStatus},
        machine::{FINAL_NOTICE_TIMEOUT, Machine, STDERR_TIMEOUT, StderrLog},
        share::{FileServer, ShareError},
    },
};

/// How long a killed file server may take to end. A file system can keep it in an uninterruptible call. The
/// deletion of a container takes this time and that of containerd's call of `delete`.
const REAP_LIMIT: Duration = Duration::from_secs(3);

/// A file server and its process. Clones refer to the same process.
#[derive(Debug, Clone)]
pub(super) struct RunningFileServer {
    server: Arc<FileServer>,
    child: Arc<Child>,
    /// `None` after the end.
    stderr: Arc<Mutex<Option<StderrLog>>>,
}

impl RunningFileServer {
    /// Starts a file server beside the process `vmm`, and returns it with the vmm's socket. `None` if the launcher
    /// starts no file servers. Call it on the shim's main thread. Needs the Tokio runtime.
    pub(super) fn start(launcher: &dyn Launcher, vmm: &Child) -> Result<Option<(Self, OwnedFd)>, ShareError> {
        // Without the pidfd, the file server makes namespaces of its own.
        let vmm = vmm.try_clone_descriptor().ok();
        let Some((mut server, socket)) = launcher.spawn_file_server(vmm)? else {
            return Ok(None);
        };
        let stderr = server.take_stderr();
        let child = Child::from_std(server.child()).map_err(|source| ShareError::Start {
            step: "watch the process",
            source,
        })?;
        let stderr = stderr.map(|stderr| StderrLog::start(stderr, "file server", child.pid()));
        let running = Self {
            server: Arc::new(server),
            child: Arc::new(child),
            stderr: Arc::new(Mutex::new(stderr)),
        };
        Ok(Some((running, socket)))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Makes files of the container `id` available with `attach`. If their file system hangs, the caller gets an error,
    /// and what appears later is removed again.
    pub(super) async fn attach<T: Send + 'static>(
        &self,
        id: &ContainerId,
        attach: impl FnOnce(&FileServer) -> Result<T, ShareError> + Send + 'static,
    ) -> Result<T, PodError> {
        let (server, late_server, id) = (self.server.clone(), self.server.clone(), id.to_string());
        let attached = blocking::run_or_undo(
            "mount the container's files",
            FILE_SYSTEM_LIMIT,
            move || attach(&server),
            move |_late| {
                if let Err(error) = late_server.detach(&id) {
                    log::warn!("cannot detach the files of container {id}: {error}");
                }
            },
        );
        Ok(attached.await??)
    }

    /// Removes all files of the container `id`.
    pub(super) async fn detach(&self, id: &ContainerId) -> Result<(), PodError> {
        let (server, id) = (self.server.clone(), id.to_string());
        let detached = blocking::run("unmount the container's files", move || server.detach(&id));
        Ok(detached.await??)
    }

    /// Kills `machine` when the process ends: its guest cannot work without its files. Needs the Tokio runtime.
    pub(super) fn kill_machine_at_exit(&self, machine: Weak<Machine>) {
        // Passes only the child: a reference to the server would keep the mounts of its tree.
        tokio::spawn(follow_process(self.child.clone(), machine, false));
    }

    /// Kills `machine`, which runs a user's kernel, when the process fails. The process exits with status 0 when the
    /// guest resets the device, as a kernel does before it switches off or reboots: that is no failure. Needs the Tokio
    /// runtime.
    pub(super) fn kill_machine_at_failure(&self, machine: Weak<Machine>) {
        tokio::spawn(follow_process(self.child.clone(), machine, true));
    }

    /// Sends the process SIGKILL.
    pub(super) fn kill(&self) {
        self.child.kill();
    }

    /// Kills the process and reaps it. Returns it if it does not end in time; call [`Self::reap`] then.
    pub(super) async fn end(self) -> Option<Self> {
        self.kill();
        let reaped = tokio::time::timeout(REAP_LIMIT, self.reap()).await;
        if reaped.is_err() {
            log::warn!(
                "the file server process {} does not end after SIGKILL: a file system of this host hangs",
                self.pid()
            );
        }
        let stderr = self.stderr.lock().take();
        if let Some(stderr) = stderr {
            stderr.finish(STDERR_TIMEOUT).await;
        }
        reaped.is_err().then_some(self)
    }

    /// Reaps the process when it ends. A file system that hangs can delay that without limit.
    pub(super) async fn reap(&self) {
        if let Err(error) = self.child.reap().await {
            log::warn!("cannot reap the file server process {}: {error}", self.pid());
        }
    }
}

/// `may_be_reset`: the guest may reset the device, and goes on without its shared directories.
async fn follow_process(child: Arc<Child>, machine: Weak<Machine>, may_be_reset: bool) {
    let (Ok(status), Some(machine)) = (child.wait().await, machine.upgrade()) else {
        return;
    };
    if status == WaitStatus::Exited(0) {
        // The vmm has closed the connection. If it is ending too, its own message says why the machine ended.
        let ended = machine.ended();
        if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, ended).await.is_ok() {
            return;
        }
        if may_be_reset {
            log::info!(
                "the guest has reset the device of its shared directories, which are not available until its next boot"
            );
            return;
        }
    }
    machine.kill(&format!("the file server of the virtual machine {status}"));
}
