//! Calls of a pod's agent on behalf of a task, and the errors that they end with.

use std::{future::Future, time::Duration};

use nutshell_protocol::{FailureKind, Request};

use super::limits::END_REASON_LIMIT;
use crate::shim::{
    error::{ErrorCode, TaskError},
    machine::{AgentError, describe_request},
    pod::Pod,
};

/// Sends a request to the agent of `pod`, and waits for at most `limit` until it is done.
///
/// # Errors
///
/// Those of [`call_agent`].
pub(super) async fn run_in_guest(pod: &Pod, limit: Duration, request: Request) -> Result<(), TaskError> {
    let (machine, action) = (pod.machine(), describe_request(&request));
    call_agent(pod, limit, &action, machine.agent().run(request)).await
}

/// Waits for `response` of the agent of `pod`, for at most `limit`. `action` is from [`describe_request`].
///
/// # Errors
///
/// `UNAVAILABLE` if the machine ended or did not answer; else the agent's error.
pub(super) async fn call_agent<T>(
    pod: &Pod,
    limit: Duration,
    action: &str,
    response: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, TaskError> {
    match tokio::time::timeout(limit, response).await.ok() {
        Some(Err(error @ AgentError::Gone)) => Err(machine_ended(pod, &error).await),
        response => check_response(limit, action, response),
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

/// Converts the outcome of a request for `action`: `None` if there was no response within `limit`.
pub(super) fn check_response<T>(
    limit: Duration,
    action: &str,
    response: Option<Result<T, AgentError>>,
) -> Result<T, TaskError> {
    let error = match response {
        Some(Ok(response)) => return Ok(response),
        Some(Err(error)) => error,
        None => {
            let text = format!(
                "the guest agent did not answer the request to {action} within {} s: the guest is overloaded or hangs, see \
                 its console (containerd-shim-nutshell-v2 console ID)",
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
        AgentError::TooLarge { .. } => ErrorCode::InvalidArgument,
        AgentError::Unexpected { .. } => ErrorCode::Unknown,
    };
    Err(TaskError::new(code, error.to_string()))
}

/// The error of Kill for a process that has ended: the same words as runc's.
pub(super) fn already_finished() -> TaskError {
    TaskError::new(ErrorCode::NotFound, "process already finished")
}
