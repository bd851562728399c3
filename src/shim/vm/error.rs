//! The failures of virtual machines.

use std::{io, path::PathBuf, sync::Arc};

use nutshell_protocol::Failure;

use super::seed::SeedError;
use crate::{
    control::ControlError,
    shim::{
        blocking::BlockingError,
        machine::{AgentError, MachineExit},
        network::NetworkError,
        pod::PodError,
        share::ShareError,
    },
};

/// Why a virtual machine cannot be created or booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    /// An image has no disk, or more than one.
    #[error("{} of the image: {reason}", path.display())]
    Image { path: PathBuf, reason: String },
    /// A volume cannot be a disk.
    #[error("disk {name}: {reason}")]
    Volume { name: String, reason: String },
    #[error("{}: cannot {step}: {source}", path.display())]
    Disk {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("{field} {}: {reason}", path.display())]
    KernelFile {
        /// The annotation.
        field: &'static str,
        path: PathBuf,
        reason: String,
    },
    #[error("cannot read {path}: {reason}")]
    HostBoot { path: &'static str, reason: String },
    #[error("cannot take the user {uid} and group {gid} of the container, to open its files: {source}")]
    User { uid: u32, gid: u32, source: io::Error },
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error("cannot read {}: {source}", path.display())]
    ResolvConf { path: PathBuf, source: io::Error },
    /// There is nothing to boot.
    #[error(
        "there is no disk to boot: the image has none in /disk, and no annotation io.containerd.nutshell.vm.disk.NAME \
         contains \"boot\""
    )]
    NoDisk,
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    /// The machine of the disk reader ended.
    #[error("cannot read the disk {}: {exit}", path.display())]
    Reader { path: PathBuf, exit: Arc<MachineExit> },
    #[error("the disk {}: {source}", path.display())]
    DiskKernel { path: PathBuf, source: DiskKernelError },
    /// A bug: a boot must follow [`find_kernel`](super::VirtualMachine::find_kernel).
    #[error("the kernel of the disk was not read again before this boot")]
    NotRead,
    #[error("cannot duplicate the descriptor of the disk {serial}: {source}")]
    DiskDescriptor { serial: String, source: io::Error },
    #[error("cannot duplicate the descriptors of the kernel: {0}")]
    KernelDescriptors(#[source] io::Error),
    #[error("cannot prepare the streams of the console: {0}")]
    Console(#[source] io::Error),
    #[error("cannot connect the port of the guest agent: {0}")]
    GuestAgent(#[source] io::Error),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("cannot connect the virtual machine to its network: {0}")]
    Links(#[source] io::Error),
    #[error(transparent)]
    Pod(#[from] PodError),
    /// A client has requested the end of the virtual machine.
    #[error("a client has requested the end of the virtual machine")]
    Ended,
    /// The machine could not be built.
    #[error("the virtual machine did not start: {0}")]
    Start(Arc<MachineExit>),
}

/// Why the kernel of a disk cannot be read or booted. The text continues one that names the disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskKernelError {
    #[error("no kernel to boot was found: {}. Name one by the annotation io.containerd.nutshell.vm.kernel", .0.message)]
    NotFound(Failure),
    #[error("cannot read its kernel: {0}")]
    Agent(#[source] AgentError),
    #[error("its kernel cannot be booted: {0}. Name another one by the annotation io.containerd.nutshell.vm.kernel")]
    Unusable(String),
    #[error("cannot {step} for its kernel: {source}")]
    Memory { step: &'static str, source: io::Error },
    #[error("cannot receive its kernel: {0}")]
    Stream(#[from] ControlError),
}
