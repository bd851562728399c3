//! The state of the guest agent's port, which only the vmm knows.

use std::{sync::atomic::Ordering, time::Duration};

use crate::control::{Command, ControlError};
use crate::shim::machine::{Machine, VmmError, monitor::add_request};

/// How long the vmm may take to answer.
const PORT_TIMEOUT: Duration = Duration::from_secs(1);

impl Machine {
    /// Sends a query, unless the vmm waits for its boot command: any other command would end the vmm.
    pub(in crate::shim::machine) async fn query(&self, command: &Command) -> Result<(), VmmError> {
        match self.state.awaits_boot.load(Ordering::SeqCst) {
            true => Err(VmmError::NotStarted),
            false => Ok(self.control.send(command, &[]).await?),
        }
    }

    /// Asks the vmm whether a program in the guest has the port of the guest agent open.
    ///
    /// # Errors
    ///
    /// The machine has ended, or the vmm does not answer within [`PORT_TIMEOUT`].
    pub(crate) async fn is_guest_agent_port_open(&self) -> Result<bool, VmmError> {
        let receiver = add_request(&self.state.port_requests);
        if self.has_ended() {
            return Err(ControlError::Closed.into());
        }
        let answer = async {
            self.control.send(&Command::ReadGuestAgentPort, &[]).await?;
            receiver.await.map_err(|_| ControlError::Closed)
        };
        let answer = tokio::time::timeout(PORT_TIMEOUT, answer).await;
        Ok(answer.map_err(|_| VmmError::Timeout(PORT_TIMEOUT))??)
    }
}
