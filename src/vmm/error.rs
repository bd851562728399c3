//! The errors of building and changing a machine.

use std::{borrow::Cow, io};

use nutshell_disk_image::{CowError, ImageError};

use super::{
    boot::{BootError, SmbiosError, kernel::KernelError},
    kvm::KvmError,
};
use crate::{devices::virtio::block::JoinedFilesError, memory::MemoryError};

/// Why a machine cannot be built or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The boot command is invalid, which is a bug in the shim.
    #[error("invalid boot command: {0}")]
    BootCommand(&'static str),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("disk {0}: its command has too few descriptors")]
    DiskDescriptors(String),
    #[error("disk {serial}: {source}")]
    JoinedFiles { serial: String, source: JoinedFilesError },
    #[error("disk {serial}: {source}{}", hint(source))]
    DiskImage { serial: String, source: ImageError },
    #[error("cannot {step}: {source}")]
    Device { step: Cow<'static, str>, source: io::Error },
    #[error("the file server cannot map the added guest memory: {0}")]
    FileServer(String),
    /// The bus has no place for another one.
    #[error("the machine has too many devices: give it fewer disks")]
    TooManyDevices,
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("the machine cannot be resized: {0}")]
    Resize(String),
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// The slot does not exist or is occupied.
    #[error("slot {0} already has a device, or is not a slot for a device of this kind")]
    Slot(u32),
    /// KVM has the eventfds of the slot's first device, and later devices use them.
    #[error("slot {slot} was used by a device with {registered} queues, and cannot take one with {queues}")]
    SlotQueues {
        slot: u32,
        registered: usize,
        queues: usize,
    },
}

/// Returns a function that adds the failed `step`, in the infinitive, to an error of the operating system.
pub(super) fn device_error(step: impl Into<Cow<'static, str>>) -> impl Fn(io::Error) -> MachineError {
    let step = step.into();
    move |source| MachineError::Device {
        step: step.clone(),
        source,
    }
}

/// Where the file is that an error of a disk concerns, if the error does not name it. The shim has chosen its path.
fn hint(error: &ImageError) -> &'static str {
    match error {
        ImageError::Cow(CowError::Base(_)) | ImageError::Base(_) => "",
        ImageError::Cow(_) => ". The file is .nutshell-disk-writes… in the root of the container's snapshot",
    }
}
