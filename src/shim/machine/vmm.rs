//! The vmm process: its start and its standard error.

use std::{io, os::fd::OwnedFd, process::Stdio, time::Duration};

use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver};

use super::console::printable_tail;
use crate::{
    control::{Channel, ControlError},
    jail,
    shim::child::Child,
    vmm,
};

/// How much of a vmm's standard error is logged, in bytes. The limit is for a guest that has compromised its vmm: it
/// can write any amount.
const MAX_LOGGED_STDERR: usize = 16 << 10;

/// A vmm process that waits for its first command.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pub(crate) child: Child,
    /// The shim's end of the control channel.
    pub(crate) control: Channel,
    /// The reading end of the process's standard error.
    pub(crate) stderr: OwnedFd,
}

/// Why a request to the vmm failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmmError {
    /// The vmm is gone, or does not follow the protocol.
    #[error(transparent)]
    Channel(#[from] ControlError),
    /// The vmm reports that it cannot execute the request. The machine continues unchanged.
    #[error("{0}")]
    Refused(String),
    #[error("the vmm did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

impl VmmProcess {
    /// Starts the process. Call it on the shim's main thread: the kernel kills the process when the thread that started
    /// it ends. Needs the Tokio runtime.
    pub(crate) fn spawn() -> io::Result<Self> {
        let (control, vmm_end) = Channel::pair().map_err(io::Error::other)?;
        let (stderr, writer) = io::pipe()?;
        let child = jail::build_command(vmm::ROLE)
            .stdin(OwnedFd::from(vmm_end))
            .stdout(Stdio::null())
            .stderr(writer)
            .spawn()?;
        Ok(Self {
            child: Child::from_std(&child)?,
            control,
            stderr: stderr.into(),
        })
    }

    /// Kills a process whose machine will not be started, and reaps it.
    pub(crate) async fn discard(self) {
        self.child.kill();
        if let Err(error) = self.child.reap().await {
            log::warn!("cannot reap the unused vmm process {}: {error}", self.child.pid());
        }
    }
}

/// Logs what a process writes to its standard error until end of file, and returns the text. Anything beyond the first
/// [`MAX_LOGGED_STDERR`] bytes is dropped. `process` is what the log calls it, and `pid` its pid.
pub(crate) async fn log_stderr(stderr: OwnedFd, process: &'static str, pid: u32) -> String {
    let Ok(mut stderr) = Receiver::from_owned_fd(stderr) else {
        return String::new();
    };
    let mut kept = Vec::new();
    let mut bytes = [0; 1024];
    while let Ok(length @ 1..) = stderr.read(&mut bytes).await {
        let room = MAX_LOGGED_STDERR - kept.len();
        let new = &bytes[..length.min(room)];
        for line in printable_tail(new).lines() {
            log::warn!("{process} process {pid}: {line}");
        }
        kept.extend_from_slice(new);
    }
    printable_tail(&kept)
}
