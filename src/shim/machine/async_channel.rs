//! The shim's end of the control channel, without blocking calls.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use tokio::io::unix::AsyncFd;

use crate::control::{Channel, Command, ControlError, Notice};

/// A [`Channel`] that is registered with the Tokio runtime.
#[derive(Debug)]
pub(super) struct AsyncChannel(AsyncFd<RawChannel>);

/// Implements `AsRawFd`, which `AsyncFd` requires.
#[derive(Debug)]
struct RawChannel(Channel);

impl AsRawFd for RawChannel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsyncChannel {
    /// Makes `channel` non-blocking and registers it. Needs the Tokio runtime.
    pub(super) fn new(channel: Channel) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&channel, true)?;
        // SAFETY: a `Channel` owns its descriptor, which stays open and the same until it is dropped, and `AsyncFd`
        // owns the channel from here on.
        Ok(Self(unsafe { AsyncFd::register(RawChannel(channel)) }?))
    }

    /// Sends a command if the socket has room for it; [`ControlError::Socket`] with `WouldBlock` otherwise.
    pub(super) fn try_send(&self, command: &Command, descriptors: &[impl AsFd]) -> Result<(), ControlError> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.0.get_ref().0.send(command, &descriptors)
    }

    /// Waits until the socket has room, and sends a command.
    pub(super) async fn send(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        loop {
            match self.try_send(command, descriptors) {
                Err(error) if is_would_block(&error) => {}
                result => return result,
            }
            let mut ready = self.0.writable().await.map_err(ControlError::Socket)?;
            match self.try_send(command, descriptors) {
                Err(error) if is_would_block(&error) => ready.clear_ready(),
                result => return result,
            }
        }
    }

    /// Receives the next notice. The vmm sends no descriptors; unexpected ones are closed.
    pub(super) async fn receive(&self) -> Result<Notice, ControlError> {
        loop {
            let mut ready = self.0.readable().await.map_err(ControlError::Socket)?;
            match self.0.get_ref().0.receive() {
                Err(error) if is_would_block(&error) => ready.clear_ready(),
                Ok((notice, _)) => return Ok(notice),
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_would_block(error: &ControlError) -> bool {
    matches!(error, ControlError::Socket(error) if error.kind() == io::ErrorKind::WouldBlock)
}
