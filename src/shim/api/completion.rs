//! Calls that run to completion even if their client disconnects.

use std::{future::Future, sync::Arc};

use containerd_shim::protos::ttrpc;

use crate::shim::{error::TaskError, tasks::Tasks};

/// Runs `call` in its own tokio task, so that it finishes even if the client disconnects or times out.
///
/// # Errors
///
/// The error of the call. A panic in the call becomes `UNKNOWN`.
pub(super) async fn run_to_completion<T, F>(tasks: &Arc<Tasks>, call: impl FnOnce(Arc<Tasks>) -> F) -> ttrpc::Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T, TaskError>> + Send + 'static,
{
    let result = tokio::spawn(call(tasks.clone())).await;
    let result = result.unwrap_or_else(|error| {
        let text = format!("interrupted by a bug in the shim (see containerd's log) or by its shutdown: {error}");
        Err(TaskError::unknown(text))
    });
    Ok(result?)
}
