//! containerd's side: the short-lived actions that containerd asks of a v2 shim (`start`, `delete`,
//! `-info`, `-v`) and the daemon that serves it.
//!
//! What lives here: everything that talks to containerd or owns host resources on behalf of a pod. What may
//! not live here: anything that touches guest memory or interprets a spec (that is [`crate::oci`]).
//! `main` calls it for every role except those of the child processes.
//!
//! | folder | holds |
//! |---|---|
//! | `entry` | the command line and the actions that end at once; becoming the daemon |
//! | `api` | ttrpc: the server, and the services that translate containerd's messages |
//! | `tasks` | what each call does: the life of containers, sandboxes and their processes |
//! | `pod` | the resources of one pod: processes, control group, host-visible pids |
//! | `machine` | the virtual machine as its shim sees it: the vmm process and the agent in the guest |
//! | `stdio`, `network`, `share` | streams, links and files that a pod gets |
//!
//! Imports point downwards in this table, never upwards; the loose files below are used by all of them.

mod api;
mod child;
mod configuration;
mod entry;
mod error;
mod events;
mod logging;
mod machine;
mod network;
mod pod;
mod record;
pub(crate) mod share;
mod stdio;
mod tasks;
#[cfg(test)]
mod tests;

pub(crate) use self::entry::main;
