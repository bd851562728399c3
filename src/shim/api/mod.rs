//! The ttrpc server and the services that it offers containerd.
//!
//! What lives here: protobuf and ttrpc, translated to and from the types of [`tasks`](super::tasks). What may not
//! live here: what a call does. [`serve()`] is called once, by the process that becomes the daemon.

mod completion;
pub(super) mod connection;
mod metrics;
mod sandbox_service;
mod serve;
pub(super) mod services;
mod task_service;

pub(crate) use self::serve::{ServeContext, serve};
