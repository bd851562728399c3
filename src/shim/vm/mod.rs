//! A virtual machine that boots a user's disk or kernel, as a task.
//!
//! Belongs here:
//!
//! - its files on the host ([`files`]): the disk in the image and its copy-on-write file ([`disk`]), disks in volumes
//!   ([`volumes`]), and disks made from a Secret or ConfigMap ([`seed`]);
//! - the kernel that it boots ([`kernel`]);
//! - its state from one boot to the next ([`machine`], [`memory`]);
//! - the start of nutshell's agent in its guest ([`agent_service`]), and the client of the QEMU guest agent, which the
//!   guest may run instead ([`guest_agent`]);
//! - its resource use ([`statistics`]).
//!
//! Does not belong here: the calls of the Task service ([`super::tasks`], which calls this), and parsing bytes that a
//! user or a guest wrote, which only jailed processes and guests do. The answers of the QEMU guest agent are an
//! exception.

mod agent_service;
mod command_line;
mod disk;
mod error;
mod files;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod guest_agent;
mod kernel;
mod machine;
mod memory;
mod regular_file;
mod seed;
mod statistics;
#[cfg(test)]
mod tests;
mod volumes;

#[cfg(any(test, fuzzing))]
pub use self::{fuzz::receive_disk_kernel, guest_agent::fuzz::receive_answers};

pub(crate) use self::{
    disk::ImageRoot,
    error::VmError,
    files::VmFiles,
    guest_agent::{Finished, GuestAgent, GuestAgentError, Program},
    kernel::KernelCache,
    machine::VirtualMachine,
    statistics::process_statistics,
};
