//! Bundle to plan: what a container needs from its machine, decided once from the bundle's
//! `config.json` and the mounts that containerd sent.
//!
//! Lives here: the types of a [`Plan`] and the pure translation into them. May not live here: any
//! I/O beyond reading `config.json`, anything that knows of ttrpc, KVM or the agent's channel. The
//! shim calls [`plan()`] when a container is created and [`Bundle::read`] when a shim starts.

mod id;
mod plan;

pub(crate) use id::*;
pub(crate) use plan::*;
