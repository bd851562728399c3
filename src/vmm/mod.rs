//! The vmm: a jailed child process of the shim, one per pod, that runs the pod's machine.
//!
//! Belongs here: KVM, boot, vCPU threads, the attachment of [`crate::devices`] to the guest, and the event loop that
//! drives them. Does not belong here: anything that opens a path, a socket or a network interface. Every host resource
//! arrives as a descriptor over the control channel ([`crate::control`]). The executable's `main` calls [`main`] if the
//! first argument is [`ROLE`].

mod board;
mod boot;
mod build;
mod end_signal;
mod error;
mod event_loop;
mod file_part;
mod kvm;
mod machine;
mod progress;
mod resources;
mod serial_console;
mod stalls;
pub(crate) mod system_calls;
#[cfg(test)]
mod tests;
mod vcpu;
mod warnings;

#[cfg(any(test, fuzzing))]
pub use self::boot::kernel::fuzz::load_kernel;
#[cfg(any(test, fuzzing))]
pub(crate) use self::resources::fuzz::receive_commands;

use std::{
    fs::File,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    process::{self, ExitCode},
    sync::Arc,
};

use rustix::thread::CapabilitySet;

use self::{
    end_signal::EndSignal,
    error::{MachineError, device_error},
    event_loop::LoopExit,
    resources::BootResources,
};
use crate::{
    control::{Channel, Command, ControlError, EndReason, Notice},
    devices::console_tail::ConsoleTail,
    jail::{self, Jail, OpenAccess, Root, seccomp},
    memory,
};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "vmm";

/// The maximum number of descriptors: three streams per process of the pod and the descriptors of devices, with a
/// margin. A disk on the PC board has six for each of its queues, and a machine has at most 64 vCPUs and about a dozen
/// disks.
const MAX_DESCRIPTORS: u32 = 8192;
/// The number of descriptors for which the descriptor table is allocated at start.
const DESCRIPTOR_TABLE_SIZE: u32 = 256;
/// The maximum number of threads: vCPUs, queues of disks and network devices, and the event loop.
const MAX_THREADS: u32 = 2048;

/// The vmm process: enters the jail and runs the machine until it ends. The final message to the shim contains the
/// reason.
pub(crate) fn main() -> ExitCode {
    // If a thread panics, the machine must not continue without it.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
    // The jail takes the privilege to create it. Without it, memory has small pages, which only costs speed.
    let huge_page_file = memory::create_huge_page_file().ok();
    let confined = jail::enter(&Jail {
        role: ROLE,
        name: c"nutshell-vmm",
        root: Root::Empty,
        open_access: OpenAccess::Nothing,
        peer: None,
        capabilities: CapabilitySet::empty(),
        keep: huge_page_file.as_ref().map(AsFd::as_fd).as_slice(),
        max_descriptors: MAX_DESCRIPTORS,
        descriptor_table_size: DESCRIPTOR_TABLE_SIZE,
        max_threads: MAX_THREADS,
        calls: Some(system_calls::PROCESS),
    });
    // SAFETY: the shim started this process with its end of the control channel on descriptor 0, which nothing else in
    // this process uses.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(0) });
    match channel.try_clone() {
        Ok(channel) => warnings::install(channel),
        // The machine still works. The shim logs standard error.
        Err(error) => eprintln!("warnings of this process are lost: cannot duplicate the control channel: {error}"),
    }
    let console_tail = Arc::new(ConsoleTail::default());
    let reason = match confined {
        Ok(()) => match run(&channel, &console_tail, huge_page_file) {
            Ok(LoopExit::Ended(reason)) => reason,
            Ok(LoopExit::ShimGone) => return ExitCode::FAILURE,
            Err(error) => EndReason::BuildFailed(error.to_string()),
        },
        Err(error) => EndReason::BuildFailed(error.to_string()),
    };
    let console = console_tail.to_vec();
    // Fails only if the shim is gone.
    let _ = channel.send(&Notice::Ended { reason, console }, &[]);
    ExitCode::SUCCESS
}

/// Receives the boot command, builds the machine, and runs it until it ends. If the machine shares its memory, this is
/// `huge_page_file`, or a memfd.
fn run(
    channel: &Channel,
    console_tail: &Arc<ConsoleTail>,
    huge_page_file: Option<File>,
) -> Result<LoopExit, MachineError> {
    let (config, software, descriptors) = match channel.receive() {
        Ok((Command::Boot(config, software), descriptors)) => (config, software, descriptors),
        Ok(_) => return Err(MachineError::BootCommand("the first command is not Boot")),
        Err(ControlError::Closed) => return Ok(LoopExit::ShimGone),
        Err(error) => return Err(device_error("receive the boot command")(std::io::Error::other(error))),
    };
    let end = Arc::new(EndSignal::new().map_err(device_error("create the eventfd for the end of the machine"))?);
    let resources = BootResources::parse(config, software, descriptors)?;
    let is_users_kernel = matches!(resources.software, resources::SoftwareResources::User { .. });
    let mut machine = build::start(resources, huge_page_file, console_tail, &end)?;
    if is_users_kernel && let Err(error) = channel.send(&Notice::Built, &[]) {
        return Err(device_error("report that the machine is built")(std::io::Error::other(
            error,
        )));
    }
    seccomp::confine_thread(&system_calls::EVENT_LOOP);
    let exit = event_loop::run(&mut machine, channel, &end, console_tail);
    // Without a shim there is no reader to wait for.
    if let (LoopExit::Ended(_), Some(console)) = (&exit, &mut machine.serial_console) {
        console.finish();
    }
    Ok(exit)
}
