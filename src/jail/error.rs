//! Errors of confinement.

use std::io;

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// The role was started by hand.
    #[error("only the shim can start this role: use this executable as a runtime of containerd")]
    NotStartedByShim,
    /// The shim ended before its child was ready.
    #[error("the shim that started this process has ended")]
    Orphaned,
    /// The kernel refused a step.
    #[error("cannot confine {role}: {step}: {source} (only root on the host can start it)")]
    Step {
        role: &'static str,
        step: &'static str,
        source: io::Error,
    },
}

/// The step that failed, and its error.
pub(crate) type FailedStep = (&'static str, io::Error);

/// Adds the step to an error: `.map_err(step("make mounts private"))`.
pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> FailedStep {
    move |error| (step, error.into())
}
