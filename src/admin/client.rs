//! Calls of the private service of a shim.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim::protos::ttrpc::{
    self,
    asynchronous::{Client, transport::Socket},
    proto::Request,
};
use tokio::net::UnixStream;

use crate::shim::report::{ADMIN_SERVICE, CONSOLE, FULL_REPORT, REPORT, SHELL, ShellRequest, ShimReport};

/// How long a shim may take to answer. It waits for its vmms at most a second.
const TIMEOUT: Duration = Duration::from_secs(3);

/// How long the start of a shell may take, which waits for the guest.
const SHELL_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a call of a shim failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(
        "cannot connect to the shim at {}: {source}: run this as root; if the connection is refused, the shim has \
         ended",
        socket.display()
    )]
    Connect { socket: PathBuf, source: io::Error },
    #[error(
        "the shim at {} does not answer: {source}: try again; if this repeats, look for its messages in containerd's log",
        socket.display()
    )]
    Call { socket: PathBuf, source: ttrpc::Error },
    #[error("{0}")]
    Refused(String),
    #[error(
        "the shim at {} is of another version: {source}: use the executable that started it, or restart its pod",
        socket.display()
    )]
    Decode { socket: PathBuf, source: serde_json::Error },
    #[error("cannot encode the request: {0}")]
    Encode(#[source] serde_json::Error),
}

/// Asks the shim at `socket` for its state. With `full`, the report includes the statistics of the vmms.
pub(super) async fn call_report(socket: &Path, full: bool) -> Result<ShimReport, CallError> {
    let method = if full { FULL_REPORT } else { REPORT };
    let bytes = call(socket, method, Vec::new(), TIMEOUT).await?;
    serde_json::from_slice(&bytes).map_err(|source| CallError::Decode {
        socket: socket.to_owned(),
        source,
    })
}

/// Asks the shim at `socket` for the end of the console of the guest in which the container `id` runs.
pub(super) async fn call_console(socket: &Path, id: &str) -> Result<String, CallError> {
    let bytes = call(socket, CONSOLE, id.as_bytes().to_vec(), TIMEOUT).await?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(if text.is_empty() || text.ends_with('\n') {
        text
    } else {
        text + "\n"
    })
}

/// Asks the shim at `socket` for a shell. When this returns, the shim has connected to the socket in `request`.
pub(super) async fn call_shell(socket: &Path, request: &ShellRequest) -> Result<(), CallError> {
    let payload = serde_json::to_vec(request).map_err(CallError::Encode)?;
    call(socket, SHELL, payload, SHELL_TIMEOUT).await.map(drop)
}

async fn call(socket: &Path, method: &str, payload: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, CallError> {
    let stream = UnixStream::connect(socket).await.map_err(|source| CallError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    let client = Client::new(Socket::from(stream));
    let request = Request {
        service: ADMIN_SERVICE.to_owned(),
        method: method.to_owned(),
        payload,
        timeout_nano: i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX),
        ..Request::default()
    };
    let response = client.request(request).await.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => CallError::Refused(status.message),
        source => CallError::Call {
            socket: socket.to_owned(),
            source,
        },
    })?;
    Ok(response.payload)
}
