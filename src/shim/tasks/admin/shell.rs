//! Shells in the guest for an administrator. Bytes do not pass through the shim: the vmm gets the descriptor of the
//! connection to the client.

use std::{os::fd::AsFd, path::PathBuf, sync::Arc};

use nutshell_protocol::{OpenShell, Request};
use tokio::net::UnixStream;

use crate::{
    guest_image,
    shim::{
        blocking,
        error::{ErrorCode, TaskError},
        report::ShellRequest,
        tasks::{
            Tasks,
            agent_call::run_in_guest,
            limits::{CREATE_LIMIT, REQUEST_LIMIT},
            virtual_machine::calls::no_agent,
        },
    },
};

const CONTEXT: &str = "open a shell in the guest";

impl Tasks {
    /// Starts a shell in the guest of the container `request.id`, and connects it to the client.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`; `FAILED_PRECONDITION` if the configuration forbids shells; `UNAVAILABLE` if the guest does not
    /// answer.
    pub(crate) async fn open_shell(self: &Arc<Self>, request: ShellRequest) -> Result<(), TaskError> {
        if !self.configuration.shell {
            let text = "shells are disabled: `shell = false` in section [guest] of the shim's configuration";
            return Err(TaskError::new(ErrorCode::FailedPrecondition, text));
        }
        let container = self
            .created_container(&request.id)
            .ok_or_else(|| TaskError::new(ErrorCode::NotFound, format!("container {} not found", request.id)))?;
        if container.virtual_machine.is_some() {
            return Err(no_agent("open a shell"));
        }
        let program = blocking::run("read the shell of this executable", guest_image::read_shell)
            .await
            .map_err(|error| TaskError::unknown(error.to_string()))?
            .map_err(|error| TaskError::unknown(error.to_string()))?;
        let client = connect(request.socket).await?;
        let (pod, descriptor) = (&container.pod, client.as_fd());
        let opened = pod.machine().open_stream(Some(descriptor), Some(descriptor)).await;
        let mut stream =
            opened.map_err(|error| TaskError::new(ErrorCode::Unavailable, error.to_string()).during(CONTEXT))?;
        log::info!("task {}: an administrator opens a shell in its guest", request.id);
        let open = Request::OpenShell(OpenShell {
            stream_port: stream.port(),
            program,
            terminal: request.terminal,
        });
        if let Err(error) = run_in_guest(pod, CREATE_LIMIT, open).await {
            pod.machine().close_stream(&stream).await;
            return Err(error.during(CONTEXT));
        }
        tokio::spawn(async move {
            stream.closed().await;
            log::info!("task {}: a shell in its guest has ended", request.id);
            drop(client);
        });
        Ok(())
    }
}

/// Connects to the socket of the client.
async fn connect(socket: PathBuf) -> Result<UnixStream, TaskError> {
    let failed = |error: String| TaskError::unknown(format!("connect to the client at {}: {error}", socket.display()));
    match tokio::time::timeout(REQUEST_LIMIT, UnixStream::connect(&socket)).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("no answer within {} s", REQUEST_LIMIT.as_secs()))),
    }
}
