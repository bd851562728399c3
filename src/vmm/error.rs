//! Why a machine cannot be built or changed.

use std::io;

use super::{
    boot::{BootError, kernel::KernelError},
    kvm::KvmError,
};
use crate::memory::MemoryError;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// Not what a shim of this version sends.
    #[error("the boot command does not fit its descriptors: {0}")]
    Command(&'static str),
    /// The guest cannot be made to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be made.
    #[error("{what}: {source}")]
    Device {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file server does not take the machine's memory.
    #[error("the file server does not take more guest memory: {0}")]
    FileServer(String),
    /// A slot that does not exist, or is taken.
    #[error("there is no empty slot {0} for a device of this kind")]
    Slot(u32),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Names the device in an error of the operating system.
pub(super) fn device(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Device { what, source }
}
