//! Calls of a pod's agent on behalf of a task, and the errors that they end with.

use std::{future::Future, time::Duration};

use nutshell_protocol::FailureKind;

use super::limits::END_REASON_LIMIT;
use crate::shim::{
    error::{ErrorCode, TaskError},
    machine::AgentError,
    pod::Pod,
};

/// Waits for `response` of the agent of `pod`, for at most `limit`.
///
/// # Errors
///
/// `UNAVAILABLE` if the machine ended or did not answer; else the agent's error.
pub(super) async fn call_agent<T>(
    pod: &Pod,
    limit: Duration,
    response: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, TaskError> {
    match tokio::time::timeout(limit, response).await.ok() {
        Some(Err(error @ AgentError::Gone)) => Err(machine_ended(pod, &error).await),
        response => check_response(limit, response),
    }
}

/// Converts an `error` that the end of a machine caused. Its text becomes the reason for that end, if it is known in
/// time.
pub(super) async fn machine_ended(pod: &Pod, error: &impl std::error::Error) -> TaskError {
    let text = match tokio::time::timeout(END_REASON_LIMIT, pod.machine().ended()).await {
        Ok(ending) => ending.to_string(),
        Err(_) => error.to_string(),
    };
    TaskError::new(ErrorCode::Unavailable, text)
}

/// Converts the outcome of a request: `None` if there was no response within `limit`.
pub(super) fn check_response<T>(limit: Duration, response: Option<Result<T, AgentError>>) -> Result<T, TaskError> {
    let error = match response {
        Some(Ok(response)) => return Ok(response),
        Some(Err(error)) => error,
        None => {
            let text = format!(
                "the guest agent did not answer the request within {} s",
                limit.as_secs()
            );
            return Err(TaskError::new(ErrorCode::Unavailable, text));
        }
    };
    let code = match &error {
        AgentError::Failed(failure) => match failure.kind {
            FailureKind::AlreadyExists => ErrorCode::AlreadyExists,
            FailureKind::FailedPrecondition => ErrorCode::FailedPrecondition,
            FailureKind::Internal => ErrorCode::Unknown,
            FailureKind::InvalidArgument => ErrorCode::InvalidArgument,
            FailureKind::NotFound => ErrorCode::NotFound,
            FailureKind::Unimplemented => ErrorCode::Unimplemented,
        },
        AgentError::Gone => ErrorCode::Unavailable,
        AgentError::TooLarge(_) => ErrorCode::InvalidArgument,
        AgentError::Unexpected => ErrorCode::Unknown,
    };
    Err(TaskError::new(code, error.to_string()))
}

/// The error of Kill for a process that has ended: the same words as runc's.
pub(super) fn already_finished() -> TaskError {
    TaskError::new(ErrorCode::NotFound, "process already finished")
}
