//! Signals in the type of containerd's requests.

pub(in crate::shim::tasks) const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// Whether a process that does not handle the signal ends with it, as the pause program of a sandbox does.
pub(in crate::shim::tasks) fn is_terminating(signal: u32) -> bool {
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGKILL, libc::SIGTERM]
        .iter()
        .any(|terminating| terminating.unsigned_abs() == signal)
}
