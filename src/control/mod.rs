//! The control channel between shim and vmm.
//!
//! Belongs here: the messages ([`Command`] to the vmm, [`Notice`] to the shim), the socket that carries them
//! ([`Channel`]), and the rate limit that both ends apply to warnings ([`RateLimit`]). Does not belong here: the
//! handling of a message. The shim sends commands (`shim/machine`), the vmm executes them (`vmm/event_loop.rs`).
//!
//! Both ends are the same executable, so messages carry no version. The shim still treats everything that the vmm
//! sends as hostile: the vmm is the process that a guest attacks first. The vmm receives every host resource over this
//! channel and opens none itself.

mod channel;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod lease;
mod message;
mod rate_limit;

pub(crate) use self::{
    channel::{Channel, ControlError, MAX_DESCRIPTORS},
    lease::{DomainName, Lease, Prefix, Route},
    message::{
        BaseFormat, BoardKind, Command, DeviceCounters, DiskAccess, DiskConfig, EndReason, FileAccess,
        GUEST_AGENT_PORT, LinkConfig, MAX_CONSOLE_TAIL, MAX_WARNING, MachineConfig, MachineStatistics, MemoryState,
        Notice, Software, VNET_HEADER_SIZE, monotonic_now,
    },
    rate_limit::RateLimit,
};
pub(crate) use crate::memory::Extent;
