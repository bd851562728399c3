//! Errors of confinement.

use std::io;

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// The role was started by hand.
    #[error(
        "this command is internal, and only the shim can start it: to run containers, configure this executable as a \
         runtime of containerd"
    )]
    NotStartedByShim,
    /// The shim ended before its child was ready.
    #[error("the shim that started this process has ended")]
    Orphaned,
    /// The kernel refused a step.
    #[error("cannot confine {role}: {step}: {source}{}", privilege_hint(source))]
    Step {
        role: &'static str,
        step: &'static str,
        source: io::Error,
    },
}

/// What to do if the kernel refused a step for lack of privileges.
fn privilege_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (the shim must be root on the host, outside of any user namespace)",
        _ => "",
    }
}

/// The step that failed, and its error.
pub(crate) type FailedStep = (&'static str, io::Error);

/// Adds the step to an error: `.map_err(step("make mounts private"))`.
pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> FailedStep {
    move |error| (step, error.into())
}
