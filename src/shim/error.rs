//! The error of a call: a gRPC code, which containerd and its clients act on, and a message for the user.

use containerd_shim::protos::ttrpc::{self, Code};

/// A failed call of the Task or Sandbox service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct TaskError {
    code: ErrorCode,
    message: String,
}

/// The gRPC codes that the shim returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorCode {
    /// The id is in use.
    AlreadyExists,
    /// The state of the container or process does not allow the call.
    FailedPrecondition,
    /// The request or the spec is wrong.
    InvalidArgument,
    /// The container or process does not exist. containerd treats it as gone, so no other error may have this code.
    NotFound,
    /// The machine has ended or does not answer, or the shim is shutting down.
    Unavailable,
    /// Not supported.
    Unimplemented,
    /// Any other error. runc's shim reports all of its errors with this code.
    Unknown,
}

impl ErrorCode {
    /// The code in the type of the ttrpc library.
    pub(crate) fn to_grpc(self) -> Code {
        match self {
            Self::AlreadyExists => Code::ALREADY_EXISTS,
            Self::FailedPrecondition => Code::FAILED_PRECONDITION,
            Self::InvalidArgument => Code::INVALID_ARGUMENT,
            Self::NotFound => Code::NOT_FOUND,
            Self::Unavailable => Code::UNAVAILABLE,
            Self::Unimplemented => Code::UNIMPLEMENTED,
            Self::Unknown => Code::UNKNOWN,
        }
    }
}

impl TaskError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// An error with [`ErrorCode::Unknown`].
    pub(crate) fn unknown(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unknown, message)
    }

    pub(crate) fn code(&self) -> ErrorCode {
        self.code
    }

    /// The same error with `context:` before its text.
    pub(crate) fn during(self, context: &str) -> Self {
        Self {
            message: format!("{context}: {}", self.message),
            ..self
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code.to_grpc(), error.message))
    }
}
