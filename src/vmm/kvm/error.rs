//! The errors of KVM's calls.

use std::io;

/// Why the host cannot run the virtual machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmError {
    /// An ioctl failed; `what` is its purpose.
    #[error("KVM: {what} failed: {source}")]
    Call { what: &'static str, source: io::Error },
    /// The descriptor from the shim is not the KVM device.
    #[error("/dev/kvm is not KVM's device: load the module kvm_intel or kvm_amd")]
    NotKvm,
    /// `KVM_CREATE_VM` failed with `EBUSY`.
    #[error(
        "/dev/kvm is busy: another hypervisor (VirtualBox, VMware) uses the processor's virtualization; stop it, or \
         unload its kernel module"
    )]
    Busy,
    #[error("this host's KVM lacks {0}, which nutshell needs: use a newer kernel")]
    MissingCapability(&'static str),
}

/// Adds the purpose of a KVM call to its error.
pub(super) fn check<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|error| KvmError::Call {
        what,
        source: error.into(),
    })
}
