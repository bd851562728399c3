//! A virtual machine that boots a user's disk or kernel, as a task.
//!
//! Belongs here: its files on the host ([`files`]): the disk in the image and its copy-on-write file ([`disk`]), disks in
//! volumes ([`volumes`]), and disks made from a Secret or ConfigMap ([`seed`]); the kernel that it boots ([`kernel`]); the
//! machine from one boot to the next ([`machine`]); the client of the agent that its guest may run ([`guest_agent`]); its
//! resource use ([`statistics`]). Does not belong here: the calls of the Task service ([`super::tasks`], which calls
//! this), and parsing bytes that a user or a guest wrote, which only jailed processes and guests do, except for the
//! answers of the guest agent.

mod disk;
mod error;
mod files;
mod guest_agent;
mod kernel;
mod machine;
mod regular_file;
mod seed;
mod statistics;
#[cfg(test)]
mod tests;
mod volumes;

pub(crate) use self::{
    disk::ImageRoot,
    error::VmError,
    files::VmFiles,
    guest_agent::{Finished, GuestAgent, GuestAgentError, Program},
    machine::VirtualMachine,
    statistics::process_statistics,
};
