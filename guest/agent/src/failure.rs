//! Creates the [`Failure`] of a request, and adds steps to errors.

use std::{fmt, io};

use nutshell_protocol::{Failure, FailureKind};

/// Constructors for the kinds of failure that the agent reports.
pub(crate) trait FailureExt {
    /// An operation failed that should have succeeded.
    fn internal(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::Internal,
            message: message.into(),
        }
    }

    /// The request or its OCI spec is invalid.
    fn invalid(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::InvalidArgument,
            message: message.into(),
        }
    }

    /// A container or exec with that id exists already, or the pod is set up already.
    fn exists(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::AlreadyExists,
            message: message.into(),
        }
    }

    /// The container, exec or process does not exist.
    fn not_found(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::NotFound,
            message: message.into(),
        }
    }

    /// This agent does not support the request.
    fn unsupported(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::Unimplemented,
            message: message.into(),
        }
    }

    /// The state of the container does not allow the request.
    fn precondition(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::FailedPrecondition,
            message: message.into(),
        }
    }
}

impl FailureExt for Failure {}

/// Turns any error into a [`Failure`] that names the failed step.
pub(crate) trait Context<T> {
    /// Maps the error to `Failure::internal("<what>: <error>")`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::internal(format!("{}: {error}", what())))
    }
}

/// Returns a function that adds the failed `step`, in the infinitive, to an error of the operating system. The error
/// keeps its kind.
pub(crate) fn at_step<E: Into<io::Error>>(step: impl fmt::Display) -> impl FnOnce(E) -> io::Error {
    move |error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{step}: {error}"))
    }
}
