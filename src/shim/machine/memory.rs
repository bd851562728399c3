//! The size of a machine: changes of it, and what the guest does with its memory.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{Machine, VmmError, monitor::add_request};
use crate::control::{Command, ControlError, MemoryState};

/// How long the guest may take to report its memory. Its driver needs no memory and no lock for that.
const STATE_TIMEOUT: Duration = Duration::from_secs(1);

impl Machine {
    /// Changes the size of the machine: `memory` in bytes beyond its boot memory, and the minimum number of vCPUs
    /// (see [`Command::Resize`]). One call at a time. The guest starts to add or remove memory and vCPUs after
    /// `Request::ResizeMachine`.
    pub(crate) async fn resize(&self, memory: u64, vcpus: u8) -> Result<(), VmmError> {
        let (sender, receiver) = oneshot::channel();
        *self.state.resize_request.lock() = Some(sender);
        self.send_and_wait(&Command::Resize { memory, vcpus }, &[], receiver)
            .await
    }

    /// Waits until the guest has exactly `bytes` of memory beyond its boot memory.
    pub(crate) async fn memory_plugged(&self, bytes: u64) {
        let mut plugged = self.state.plugged_memory.subscribe();
        if plugged.wait_for(|plugged| *plugged == Some(bytes)).await.is_err() {
            // Cannot happen: `self` keeps the sender alive.
            std::future::pending::<()>().await;
        }
    }

    /// Asks the guest for the state of its memory.
    ///
    /// # Errors
    ///
    /// The machine has ended, or the guest does not answer within [`STATE_TIMEOUT`].
    pub(crate) async fn guest_memory(&self) -> Result<MemoryState, VmmError> {
        let receiver = add_request(&self.state.memory_requests);
        if self.has_ended() {
            return Err(ControlError::Closed.into());
        }
        let answer = async {
            self.query(&Command::ReadGuestMemory).await?;
            receiver.await.map_err(|_| VmmError::from(ControlError::Closed))
        };
        let answer = tokio::time::timeout(STATE_TIMEOUT, answer).await;
        answer.map_err(|_| VmmError::Timeout(STATE_TIMEOUT))?
    }
}
