//! Why a machine ended.

use std::fmt;

use crate::{control::EndReason, shim::child::WaitStatus};

/// Why a machine ended, and the tail of its guest's console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MachineExit {
    pub(super) reason: String,
    /// The shim stopped the machine on purpose: the end is not a failure.
    pub(super) requested: bool,
    /// What the vmm reported. `None` if it reported nothing, or if the shim ended the machine.
    pub(super) reported: Option<EndReason>,
    /// Empty if the vmm did not send it.
    pub(super) console: String,
}

impl MachineExit {
    /// Whether the guest switched the machine off.
    pub(crate) fn is_power_off(&self) -> bool {
        self.reported == Some(EndReason::GuestPowerOff)
    }

    /// Whether the guest reset the machine.
    pub(crate) fn is_reset(&self) -> bool {
        self.reported == Some(EndReason::GuestReset)
    }
}

impl fmt::Display for MachineExit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.reason)?;
        if !self.console.is_empty() {
            write!(formatter, "; the end of the guest's console:\n{}", self.console)?;
        }
        Ok(())
    }
}

/// The shim's decision to end a machine.
#[derive(Debug)]
pub(super) struct EndRequest {
    pub(super) reason: String,
    /// See [`MachineExit::requested`].
    pub(super) requested: bool,
}

/// The text for a reason that the vmm reported.
pub(super) fn describe_end(reason: &EndReason) -> String {
    match reason {
        EndReason::BuildFailed(text) => format!("cannot build the virtual machine: {text}"),
        EndReason::GuestPowerOff => "the guest switched itself off".to_owned(),
        EndReason::GuestReset => "the guest reset itself: its kernel or its agent gave up".to_owned(),
        EndReason::KvmFailed(text) => format!("KVM cannot run the guest: {text}"),
        EndReason::DeviceFailed(text) => format!("a device of the virtual machine failed: {text}"),
    }
}

/// The text for a vmm that ended without reporting a reason.
pub(super) fn describe_death(status: WaitStatus, stderr: &str) -> String {
    match stderr.trim() {
        "" => format!("the virtual machine's process {status}"),
        stderr => format!("the virtual machine's process {status}: {stderr}"),
    }
}
