//! The containers of this shim and the calls that change them.
//!
//! Belongs here: the effect of each call of the Task and Sandbox services, in the types of this crate. Does not belong
//! here: protobuf services and ttrpc (those are in [`super::api`]), and the start of machines (that is [`super::pod`]).
//! `api` calls it.
//!
//! | file | holds |
//! |---|---|
//! | `table` | all containers, by id, and the shutdown of the shim |
//! | `container` | one container with its processes, their states and the hooks of its spec |
//! | `create`, `start`, `control`, `delete` | the calls of the Task service |
//! | `sandbox` | the sandbox of a pod, and the calls of the Sandbox service |
//! | `steps` | steps that several calls have in common |
//! | `virtual_machine` | the calls for a virtual machine with a user's disk or kernel |
//! | `exit` | unsolicited events: exits, out of memory, the end of a machine |
//! | `killed` | processes that do not end after SIGKILL |
//! | `size` | the resizing of a machine to the limits of its containers |
//! | `admin` | reports for an administrator, and shells in the guest |
//! | `agent_call`, `limits` | requests to the agent, and how long they may take |
//!
//! All of it runs on the shim's main thread. A call that has begun is finished even if its client disconnects, so
//! that it leaves nothing half-done.

mod admin;
mod agent_call;
mod container;
mod control;
mod create;
mod delete;
mod exit;
mod killed;
mod limits;
mod sandbox;
mod size;
mod start;
mod steps;
mod table;
mod virtual_machine;

pub(crate) use self::{
    container::lifecycle::{Phase, SIGKILL_STATUS},
    create::CreateRequest,
    sandbox::SandboxRequest,
    start::ExecRequest,
    table::Tasks,
};
