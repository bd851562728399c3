//! Calls to containerd's CRI service: gRPC over HTTP/2 on a Unix socket, with a new connection for each call.

use std::{fmt, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

use crate::messages::Call;

/// The socket of containerd.
pub(crate) const SOCKET: &str = "/run/containerd/containerd.sock";

const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call failed: the status that the service sent, or an error of the connection.
#[derive(Debug)]
pub(crate) struct CallError {
    /// The gRPC status code; 14 (unavailable) if there was no response.
    pub(crate) code: u32,
    /// The message of the status.
    pub(crate) message: String,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code)
    }
}

fn unavailable(error: impl fmt::Display) -> CallError {
    CallError {
        code: 14,
        message: error.to_string(),
    }
}

/// Calls a method and returns its response.
pub(crate) fn call<C: Call>(request: &C) -> Result<C::Response, CallError> {
    let response = async {
        tokio::time::timeout(CALL_TIMEOUT, exchange(C::METHOD, &request.encode_to_vec()))
            .await
            .map_err(|_| unavailable(format_args!("{}: no response within {CALL_TIMEOUT:?}", C::METHOD)))?
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(unavailable)?;
    let response = runtime.block_on(response)?;
    C::Response::decode(response).map_err(unavailable)
}

async fn exchange(method: &str, message: &[u8]) -> Result<Bytes, CallError> {
    let stream = UnixStream::connect(SOCKET).await.map_err(unavailable)?;
    let (client, connection) = h2::client::handshake(stream).await.map_err(unavailable)?;
    // This task is not awaited: if the connection fails, the request below fails too.
    tokio::spawn(connection);
    let mut client = client.ready().await.map_err(unavailable)?;
    let request = Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(unavailable)?;
    let (response, mut body) = client.send_request(request, false).map_err(unavailable)?;
    // A gRPC frame: a byte for no compression, the length, the message.
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).map_err(unavailable)?);
    frame.put_slice(message);
    body.send_data(frame.freeze(), true).map_err(unavailable)?;

    let (head, mut body) = response.await.map_err(unavailable)?.into_parts();
    // A call that fails at once has its status in the headers.
    check_status(&head.headers)?;
    let mut received = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part.map_err(unavailable)?;
        body.flow_control().release_capacity(part.len()).map_err(unavailable)?;
        received.extend_from_slice(&part);
    }
    let trailers = body.trailers().await.map_err(unavailable)?;
    check_status(&trailers.unwrap_or_default())?;
    if received.len() < 5 {
        return Err(unavailable(format_args!("{method}: the response is empty")));
    }
    received.advance(5);
    Ok(received.freeze())
}

fn check_status(headers: &HeaderMap) -> Result<(), CallError> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => Err(CallError {
            code: code.parse().unwrap_or(2),
            message: percent_decode(text("grpc-message").unwrap_or_default()),
        }),
    }
}

/// Decodes a status message, in which gRPC encodes bytes that are not printable as `%XX`.
fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
