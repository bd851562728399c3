//! The errors of KVM's calls.

use std::io;

/// Why the host cannot run the virtual machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmError {
    /// An ioctl failed; `what` is its purpose.
    #[error("KVM: {what} failed: {source}")]
    Call { what: &'static str, source: io::Error },
    /// `KVM_GET_API_VERSION` of the descriptor from the shim does not return 12.
    #[error(
        "/dev/kvm is not the KVM device, or does not have API version 12: remove the file, and load the module kvm_intel \
         or kvm_amd, which creates the device"
    )]
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
