//! The agents that the system of a user's guest may run: the stream of nutshell's agent, and the state of the port of the
//! QEMU guest agent.
//!
//! Belongs here: how they are reached. Does not belong here: requests to them. [`crate::shim::tasks`] calls it.

mod port;
mod stream;
