//! Virtual machines with a user's disk or kernel: the calls of the Task service for them.
//!
//! Belongs here: how a call differs from that for a container. Does not belong here: the files of a virtual machine,
//! and its state from one boot to the next (those are in [`crate::shim::vm`]). The other files of [`tasks`](super) call
//! it.

pub(super) mod agent_exec;
mod boots;
pub(super) mod calls;
mod create;
pub(super) mod exec;
