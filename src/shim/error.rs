//! What a Task call fails with: a gRPC code that containerd understands, and one line for the user.

use containerd_shim_protos::ttrpc::{self, Code};

/// A failed call. `NotFound` is read by containerd as "gone": it never means anything else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct TaskError {
    kind: Kind,
    message: String,
}

/// The kinds of failure that containerd and its clients tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The id is taken.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// What was asked makes no sense.
    InvalidArgument,
    /// It is gone, or never was.
    NotFound,
    /// The machine does not answer.
    Unavailable,
    /// Not offered.
    Unimplemented,
    /// Anything else, as runc's shim reports all of its failures.
    Unknown,
}

impl TaskError {
    /// A failure of a kind, with its text.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// Anything that has no code of its own.
    pub(crate) fn unknown(message: impl Into<String>) -> Self {
        Self::new(Kind::Unknown, message)
    }

    /// The kind.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The same failure, with what was tried before its text.
    pub(crate) fn during(self, context: &str) -> Self {
        Self {
            message: format!("{context}: {}", self.message),
            ..self
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let code = match error.kind {
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::NotFound => Code::NOT_FOUND,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Unknown => Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.message))
    }
}
