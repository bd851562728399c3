//! A virtual machine that boots a user's disk or kernel, as a task.
//!
//! Belongs here: the disk in the image and its copy-on-write file ([`disk`]), disks made from a Secret or ConfigMap
//! ([`seed`]), the kernel that it boots ([`kernel`]), the machine from one boot to the next ([`machine`]), the client of
//! the agent that its guest may run ([`guest_agent`]), and its resource use ([`statistics`]). Does not belong here: the
//! calls of the Task service ([`super::tasks`], which calls this), and parsing bytes that a user or a guest wrote, which
//! only jailed processes and guests do, except for the answers of the guest agent.

mod disk;
mod error;
#[cfg_attr(not(test), expect(dead_code, reason = "no exec in a virtual machine uses it yet"))]
mod guest_agent;
mod kernel;
mod machine;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "machines of users' disks cannot have a seed yet")
)]
pub(super) mod seed;
mod statistics;

pub(crate) use self::{
    disk::find_disk,
    error::VmError,
    kernel::open_kernel_files,
    machine::{KernelSource, VirtualMachine, VmSettings},
    statistics::process_statistics,
};
