//! Connections to the agents that a user's guest may run: the stream of nutshell's agent, and the state of the QEMU
//! guest agent's port.
//!
//! Belongs here: opening and checking these connections. Does not belong here: requests to the agents.
//! [`crate::shim::tasks`] calls this.

mod port;
mod stream;
