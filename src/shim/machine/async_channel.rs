//! The shim's end of the control channel, without blocking calls.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    time::Duration,
};

use tokio::io::unix::AsyncFd;

use crate::control::{Channel, Command, ControlError, Notice};

/// How long the socket may have no room for a command, which means that the vmm does not read it.
const SEND_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The step of an error.
const WAIT: &str = "wait until it is ready";

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

    /// Waits until the socket has room, for at most [`SEND_TIMEOUT`], and sends a command.
    pub(super) async fn send(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        let sent = tokio::time::timeout(SEND_TIMEOUT, self.send_when_writable(command, descriptors)).await;
        sent.unwrap_or_else(|_| {
            let full = io::Error::new(io::ErrorKind::TimedOut, "the vmm does not read its commands");
            Err(ControlError::socket("send a message")(full))
        })
    }

    async fn send_when_writable(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        loop {
            match self.try_send(command, descriptors) {
                Err(error) if error.is_would_block() => {}
                result => return result,
            }
            let mut ready = self.0.writable().await.map_err(ControlError::socket(WAIT))?;
            match self.try_send(command, descriptors) {
                Err(error) if error.is_would_block() => ready.clear_ready(),
                result => return result,
            }
        }
    }

    /// Receives the next notice. The vmm sends no descriptors; unexpected ones are closed.
    pub(super) async fn receive(&self) -> Result<Notice, ControlError> {
        loop {
            let mut ready = self.0.readable().await.map_err(ControlError::socket(WAIT))?;
            match self.0.get_ref().0.receive() {
                Err(error) if error.is_would_block() => ready.clear_ready(),
                Ok((notice, _)) => return Ok(notice),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn command_to_a_vmm_that_does_not_read_fails_in_time() {
        let (channel, vmm_end) = Channel::pair().unwrap();
        let channel = AsyncChannel::new(channel).unwrap();
        while channel
            .try_send(&Command::ReadConsole, &[] as &[BorrowedFd<'_>])
            .is_ok()
        {}

        let sent = tokio::time::timeout(SEND_TIMEOUT * 4, channel.send(&Command::ReadConsole, &[])).await;

        let error = sent.expect("an error in time").unwrap_err().to_string();
        assert!(error.contains("does not read its commands"), "{error}");
        // The channel is usable when the vmm reads again.
        assert!(matches!(vmm_end.receive(), Ok((Command::ReadConsole, _))));
        while vmm_end.try_receive::<Command>().unwrap().is_some() {}
        channel.send(&Command::ReadProgress, &[]).await.unwrap();
        assert!(matches!(vmm_end.receive(), Ok((Command::ReadProgress, _))));
    }
}
