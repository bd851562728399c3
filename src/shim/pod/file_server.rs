//! The file server process of a running pod.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use super::{error::PodError, launcher::Launcher};
use crate::shim::{
    child::{Child, WaitStatus},
    machine::{FINAL_NOTICE_TIMEOUT, Machine},
    share::{FileServer, ShareError},
};

/// A file server and its process. Clones refer to the same process.
#[derive(Debug, Clone)]
pub(super) struct RunningFileServer {
    server: Arc<FileServer>,
    child: Arc<Child>,
}

impl RunningFileServer {
    /// Starts a file server. The socket is for the vmm. `None` if the launcher has none. Call it on the shim's main
    /// thread. Needs the Tokio runtime.
    pub(super) fn start(launcher: &dyn Launcher) -> Result<Option<(Self, OwnedFd)>, ShareError> {
        let Some((server, socket)) = launcher.spawn_file_server()? else {
            return Ok(None);
        };
        let child = Child::from_std(server.child()).map_err(|source| ShareError::Start {
            step: "watch the process",
            source,
        })?;
        let running = Self {
            server: Arc::new(server),
            child: Arc::new(child),
        };
        Ok(Some((running, socket)))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Runs a change of the shared files on a thread for blocking calls: a file system that hangs must not hang the
    /// shim.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        change: impl FnOnce(&FileServer) -> Result<T, ShareError> + Send + 'static,
    ) -> Result<T, PodError> {
        let server = self.server.clone();
        let changed = tokio::task::spawn_blocking(move || change(&server)).await;
        Ok(changed.map_err(|error| PodError::Shim(error.to_string()))??)
    }

    /// Kills `machine` when the process ends: its guest cannot work without its files. Needs the Tokio runtime.
    pub(super) fn kill_machine_at_exit(&self, machine: Weak<Machine>) {
        // Passes only the child: a reference to the server would keep the mounts of its tree.
        tokio::spawn(follow_process(self.child.clone(), machine));
    }

    /// Sends the process SIGKILL.
    pub(super) fn kill(&self) {
        self.child.kill();
    }

    /// Kills the process and reaps it.
    pub(super) async fn end(self) {
        self.kill();
        if let Err(error) = self.child.reap().await {
            log::warn!("wait for the file server: {error}");
        }
    }
}

async fn follow_process(child: Arc<Child>, machine: Weak<Machine>) {
    let (Ok(status), Some(machine)) = (child.wait().await, machine.upgrade()) else {
        return;
    };
    if status == WaitStatus::Exited(0) {
        // The vmm has closed the connection. Then it is ending too, and its reason explains more.
        let ended = machine.ended();
        if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, ended).await.is_ok() {
            return;
        }
    }
    machine.kill(&format!("the file server of the virtual machine {status}"));
}
