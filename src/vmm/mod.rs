//! The machine. Runs as a child of the shim, jailed, one per pod: KVM, guest memory, boot, vCPU
//! threads and the event loop that drives the devices of [`crate::devices`].
//!
//! Nothing here opens a path, a socket or a network interface: every host resource arrives as a
//! descriptor over the [`control`] channel. The shim uses only [`control`] and [`ROLE`].

mod boot;
mod build;
mod cpuid;
mod disk_slots;
mod end;
mod error;
mod event_loop;
mod growth;
mod kvm;
mod machine;
mod vcpu;
mod wiring;

use std::{
    os::fd::{FromRawFd, OwnedFd},
    process::{self, ExitCode},
    sync::Arc,
};

use rustix::thread::CapabilitySet;

use self::{build::BootResources, end::End, error::BuildError, event_loop::LoopExit, machine::RunningMachine};
use crate::{
    control::{Channel, Command, EndReason, Notice},
    devices::virtio::console::Log,
    jail::{self, Jail, Root},
};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "vmm";

/// The most descriptors: three streams a process and what the devices hold, with room to spare.
const DESCRIPTORS: u32 = 4096;
/// For how many of them the table is made at once.
const DESCRIPTOR_TABLE: u32 = 256;
/// The most threads: vCPUs, queues of disks, and this one.
const THREADS: u32 = 2048;

/// Runs the role: jail, then the machine until it ends. Its last word to the shim says why.
pub(crate) fn main() -> ExitCode {
    // A thread that panics must not leave a machine that runs without it.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
    let confined = jail::enter(&Jail {
        role: ROLE,
        name: c"nutshell-vmm",
        root: Root::Empty,
        capabilities: CapabilitySet::empty(),
        keep: &[],
        max_descriptors: DESCRIPTORS,
        descriptor_table_size: DESCRIPTOR_TABLE,
        max_threads: THREADS,
    });
    // SAFETY: the shim started this process with its end of the control channel on descriptor 0,
    // which nothing else in this process uses.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(0) });
    let log = Arc::new(Log::default());
    let reason = match confined {
        Ok(()) => match run(&channel, &log) {
            Ok(LoopExit::Ended(reason)) => reason,
            Ok(LoopExit::ShimGone) => return ExitCode::FAILURE,
            Err(error) => EndReason::BuildFailed(error.to_string()),
        },
        Err(error) => EndReason::BuildFailed(error.to_string()),
    };
    let console = log.tail();
    // A shim that is gone need not be told.
    let _ = channel.send(&Notice::Ended { reason, console }, &[]);
    ExitCode::SUCCESS
}

fn run(channel: &Channel, log: &Arc<Log>) -> Result<LoopExit, BuildError> {
    let Ok((Command::Boot(machine), descriptors)) = channel.receive() else {
        return Ok(LoopExit::ShimGone);
    };
    let end = End::new().map_err(|source| BuildError::Device {
        what: "eventfd",
        source,
    })?;
    let end = Arc::new(end);
    let mut running: RunningMachine = build::start(BootResources::parse(machine, descriptors)?, log, &end)?;
    Ok(event_loop::run(&mut running, channel, &end, log))
}
