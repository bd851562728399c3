//! The start of the vmm process.

use std::{io, os::fd::OwnedFd, process::Stdio, time::Duration};

use crate::{
    control::{Channel, ControlError, monotonic_now},
    jail::RoleCommand,
    shim::child::Child,
    vmm,
};

/// A vmm process that waits for its first command.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pub(crate) child: Child,
    /// The shim's end of the control channel.
    pub(crate) control: Channel,
    /// The reading end of the process's standard error.
    pub(crate) stderr: OwnedFd,
    /// When it was started, on the clock of [`monotonic_now`].
    pub(crate) spawned_at: Duration,
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
    #[error("the machine has not been started")]
    NotStarted,
}

impl VmmProcess {
    /// Starts the process. Call it on the shim's main thread: the kernel kills the process when the thread that started
    /// it ends. Needs the Tokio runtime.
    pub(crate) fn spawn() -> io::Result<Self> {
        let (control, vmm_end) = Channel::pair().map_err(io::Error::other)?;
        let (stderr, writer) = io::pipe()?;
        let child = RoleCommand::new(vmm::ROLE)?
            .stdin(OwnedFd::from(vmm_end))
            .stdout(Stdio::null())
            .stderr(writer)
            .spawn()?;
        Ok(Self {
            child: Child::from_std(&child)?,
            control,
            stderr: stderr.into(),
            spawned_at: monotonic_now(),
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
