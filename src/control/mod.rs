//! The control channel between shim and vmm.
//!
//! Belongs here: the messages ([`Command`] to the vmm, [`Notice`] to the shim) and the socket that carries them
//! ([`Channel`]). Does not belong here: the handling of a message. The shim sends commands (`shim/machine`), the vmm
//! executes them (`vmm/event_loop.rs`).
//!
//! Both ends are the same executable, so messages carry no version. The shim still treats everything that the vmm
//! sends as hostile: the vmm is the process that a guest attacks first. The vmm receives every host resource over this
//! channel and opens none itself.

mod channel;
mod message;

pub(crate) use self::{
    channel::{Channel, ControlError},
    message::{Command, DiskAccess, EndReason, MAX_CONSOLE_TAIL, MachineConfig, Notice, VNET_HEADER_SIZE},
};
pub(crate) use crate::memory::Extent;
