//! Why a machine ended.

use std::fmt;

use super::console::printable_line;
use crate::{control::EndReason, shim::child::WaitStatus};

/// How Linux begins the message of a panic (`kernel/panic.c`).
const PANIC: &str = "Kernel panic - not syncing";

/// The maximum length of the message of a panic, in characters.
const MAX_PANIC: usize = 256;

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
    /// The message of the guest's kernel, if the end of its console has one of a panic.
    pub(super) panic: Option<String>,
}

impl MachineExit {
    /// Whether the guest switched the machine off.
    pub(crate) fn is_power_off(&self) -> bool {
        self.reported == Some(EndReason::GuestPowerOff)
    }

    /// The last lines of the guest's console. Empty if it wrote nothing.
    pub(crate) fn console(&self) -> &str {
        &self.console
    }

    /// The message of the guest's kernel, if the end of its console has one of a panic. A program in the guest can
    /// write such a message too.
    pub(crate) fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
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

/// Finds the last message of a panic in the output of a console: a line that begins with it, after the time.
pub(super) fn find_panic(console: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(console);
    let message = text.lines().rev().find_map(|line| {
        let message = match line.strip_prefix('[') {
            Some(rest) => rest.split_once("] ")?.1,
            None => line,
        };
        message.starts_with(PANIC).then(|| message.trim_end())
    });
    message.map(|message| printable_line(message, MAX_PANIC))
}

/// The maximum length of a reason that the vmm reported, in characters.
pub(super) const MAX_REASON: usize = 2048;

/// The text for a reason that the vmm reported.
pub(super) fn describe_end(reason: &EndReason) -> String {
    let printable = |text: &str| printable_line(text, MAX_REASON);
    match reason {
        EndReason::BuildFailed(text) => format!("cannot build the virtual machine: {}", printable(text)),
        EndReason::GuestPowerOff => "the guest switched itself off".to_owned(),
        EndReason::GuestReset => "the guest reset itself: its kernel or its agent gave up".to_owned(),
        EndReason::KvmFailed(text) => format!("KVM cannot run the guest: {}", printable(text)),
        EndReason::DeviceFailed(text) => format!("a device of the virtual machine failed: {}", printable(text)),
    }
}

/// The text for a vmm that ended without reporting a reason.
pub(super) fn describe_death(status: WaitStatus, stderr: &str) -> String {
    match stderr.trim() {
        "" => format!("the virtual machine's process {status}"),
        stderr => format!("the virtual machine's process {status}: {stderr}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_of_a_hostile_vmm_is_printable_and_clipped() {
        for reason in [EndReason::BuildFailed, EndReason::KvmFailed, EndReason::DeviceFailed] {
            let text = describe_end(&reason("a\n\x1b[2J".to_owned()));
            assert!(text.ends_with(": a\\n\\u{1b}[2J"), "{text}");
            let text = describe_end(&reason("x".repeat(60_000)));
            assert!(text.len() < MAX_REASON + 100, "{}", text.len());
        }
    }

    #[test]
    fn panic_is_found_at_the_start_of_a_line() {
        for (console, expected) in [
            (
                "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    1.3] CPU: 0\r\n",
                Some("Kernel panic - not syncing: VFS: Unable to mount root fs"),
            ),
            (
                "Kernel panic - not syncing: a\nKernel panic - not syncing: b\x1b[0m",
                Some("Kernel panic - not syncing: b\\u{1b}[0m"),
            ),
            ("[    1.3] ---[ end Kernel panic - not syncing: a ]---\n", None),
            ("web: Kernel panic - not syncing\n[half a line", None),
            ("", None),
        ] {
            assert_eq!(find_panic(console.as_bytes()).as_deref(), expected, "{console}");
        }
    }
}
