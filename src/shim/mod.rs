//! The shim: the short-lived actions of a containerd v2 shim (`start`, `delete`, `-info`, `-v`), and the process
//! that serves containerd until a shutdown.
//!
//! Belongs here: everything that communicates with containerd or owns resources of the host for a pod. Does not belong
//! here: access to guest memory, and the interpretation of a spec (that is [`crate::oci`]). `main` calls it for every
//! role except those of the child processes.
//!
//! | folder | holds |
//! |---|---|
//! | `entry` | the command line, the short-lived actions, the set-up of the shim process |
//! | `api` | the ttrpc server, and the services that translate containerd's messages |
//! | `tasks` | the effect of each call: the lifecycle of containers, sandboxes and their processes |
//! | `vm` | a virtual machine with a user's disk or kernel, from one boot to the next |
//! | `pod` | the resources of one pod: processes, control group, host-visible pids |
//! | `stdio`, `network`, `share` | the streams, links and files of a pod |
//! | `machine` | a client of the virtual machine: of the vmm process and of the agent in the guest |
//!
//! Imports point downwards in this table. All folders use `events` and the single files.

mod api;
pub(crate) mod blocking;
mod child;
mod configuration;
mod descriptor_limit;
mod descriptor_table;
mod entry;
mod error;
mod events;
mod logging;
mod machine;
mod network;
pub(crate) mod pod;
mod record;
pub(crate) mod report;
pub(crate) mod share;
mod stdio;
mod tasks;
#[cfg(test)]
mod tests;
mod vm;

#[cfg(any(test, fuzzing))]
pub(crate) use self::machine::receive_notices;
#[cfg(any(test, fuzzing))]
pub use self::{
    entry::parse_start_request,
    vm::{receive_answers, receive_disk_kernel},
};

pub(crate) use self::entry::main;
