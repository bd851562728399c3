//! The task events that a shim publishes to containerd.
//!
//! What lives here: the queue of events, the ways to deliver them, and the packing of protobuf messages
//! into containerd's envelope. What may not live here: when an event happens, which
//! [`tasks`](super::tasks) decides. `tasks` publishes, and `api` starts the queue with the forwarder that
//! containerd's command line asks for.

mod forwarder;
mod message;
mod publish_binary;
mod queue;
mod ttrpc;

#[cfg(test)]
pub(crate) use self::forwarder::Forwarder;
pub(crate) use self::{
    forwarder::NoForwarder, message::to_timestamp, publish_binary::BinaryForwarder, queue::EventQueue,
    ttrpc::TtrpcForwarder,
};
