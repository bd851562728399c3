//! The task events that a shim publishes to containerd.
//!
//! Belongs here: the queue of events, and the ways to deliver them. Does not belong here: the decision when to publish
//! an event, which [`tasks`](super::tasks) makes. `tasks` publishes, and `api` starts the queue with a forwarder.

mod forwarder;
mod publish_binary;
mod queue;
mod ttrpc;

#[cfg(test)]
pub(crate) use self::forwarder::{ForwardError, Forwarder};
pub(crate) use self::{
    forwarder::NoForwarder, publish_binary::BinaryForwarder, queue::EventQueue, ttrpc::TtrpcForwarder,
};
