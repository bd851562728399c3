//! The ttrpc server and its services.
//!
//! Belongs here: ttrpc connections, and the translation of protobuf messages to and from the types of
//! [`tasks`](super::tasks). Does not belong here: the effect of a call. The shim process calls [`serve()`] once.

mod admin_service;
mod completion;
pub(super) mod connection;
mod metrics;
mod sandbox_service;
mod serve;
pub(super) mod services;
mod task_service;

pub(crate) use self::serve::{ServeContext, serve};
