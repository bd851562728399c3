//! Calls to containerd's CRI service: gRPC over HTTP/2 on its Unix socket, one connection a call.

use std::{fmt, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

use crate::messages::Call;

/// Where containerd serves its clients.
pub(crate) const SOCKET: &str = "/run/containerd/containerd.sock";

/// What a call may take: longer than anything does in the lab, which is emulated.
const LIMIT: Duration = Duration::from_secs(120);

/// Why there is no answer: gRPC's status, or what happened to the connection.
#[derive(Debug)]
pub(crate) struct Refused {
    /// gRPC's number; 14 (unavailable) where no answer came.
    pub(crate) code: u32,
    /// What the service said.
    pub(crate) message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code)
    }
}

fn unavailable(error: impl fmt::Display) -> Refused {
    Refused {
        code: 14,
        message: error.to_string(),
    }
}

/// Calls a method and waits for its answer.
pub(crate) fn call<C: Call>(request: &C) -> Result<C::Answer, Refused> {
    let answer = async {
        tokio::time::timeout(LIMIT, exchange(C::METHOD, &request.encode_to_vec()))
            .await
            .map_err(|_| unavailable(format_args!("{}: no answer within {LIMIT:?}", C::METHOD)))?
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(unavailable)?;
    let answer = runtime.block_on(answer)?;
    C::Answer::decode(answer).map_err(unavailable)
}

async fn exchange(method: &str, message: &[u8]) -> Result<Bytes, Refused> {
    let stream = UnixStream::connect(SOCKET).await.map_err(unavailable)?;
    let (client, connection) = h2::client::handshake(stream).await.map_err(unavailable)?;
    // Its error is also that of the stream.
    tokio::spawn(connection);
    let mut client = client.ready().await.map_err(unavailable)?;
    let request = Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(unavailable)?;
    let (response, mut body) = client.send_request(request, false).map_err(unavailable)?;
    // gRPC's frame: not compressed, length, message.
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).map_err(unavailable)?);
    frame.put_slice(message);
    body.send_data(frame.freeze(), true).map_err(unavailable)?;

    let (head, mut body) = response.await.map_err(unavailable)?.into_parts();
    // A refusal may be all there is.
    status_of(&head.headers)?;
    let mut received = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part.map_err(unavailable)?;
        body.flow_control().release_capacity(part.len()).map_err(unavailable)?;
        received.extend_from_slice(&part);
    }
    let trailers = body.trailers().await.map_err(unavailable)?;
    status_of(&trailers.unwrap_or_default())?;
    if received.len() < 5 {
        return Err(unavailable(format_args!("{method}: neither answer nor status")));
    }
    received.advance(5);
    Ok(received.freeze())
}

fn status_of(headers: &HeaderMap) -> Result<(), Refused> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => Err(Refused {
            code: code.parse().unwrap_or(2),
            message: unescaped(text("grpc-message").unwrap_or_default()),
        }),
    }
}

/// gRPC writes its messages with `%XX` for what is not printable.
fn unescaped(text: &str) -> String {
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
