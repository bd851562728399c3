//! The stream of an agent that a user's system runs as a service. The agent can disconnect and connect again while the
//! machine runs.

use std::{
    future::Future,
    os::{fd::AsFd, unix::net::UnixStream},
};

use nutshell_protocol::{AGENT_PORT, Event};

use crate::control::{Command, ControlError};
use crate::shim::machine::{Agent, Machine};

impl Machine {
    /// Lets an agent in the guest connect, once. Returns its client, which becomes ready when an agent has connected,
    /// and a future that completes with a reason when the stream has ended. `on_event` gets the agent's events in
    /// order, and must not block. Only one stream can be open: call this again after its end.
    pub(crate) async fn accept_agent(
        &self,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<(Agent, impl Future<Output = String> + Send + 'static), ControlError> {
        let (shim_end, guest_end) = UnixStream::pair().map_err(ControlError::Stream)?;
        let (agent, end) = Agent::start(shim_end, on_event).map_err(ControlError::Stream)?;
        // An agent that has only ended one direction of its stream still has the port.
        self.control
            .send(&Command::CloseStream { port: AGENT_PORT }, &[])
            .await?;
        let command = Command::OpenStream {
            port: AGENT_PORT,
            input: true,
            output: true,
        };
        self.control
            .send(&command, &[guest_end.as_fd(), guest_end.as_fd()])
            .await?;
        Ok((agent, end))
    }
}
