//! Connections of containerd: access control, and the delivery of the last reply.

use std::{
    collections::HashSet,
    future::Future,
    io,
    os::unix::net::UnixListener as StdUnixListener,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use containerd_shim::protos::ttrpc::{MessageHeader, asynchronous::transport::Listener, proto::MESSAGE_TYPE_REQUEST};
use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
    time::Sleep,
};

/// How long to wait after a failed accept(2). Its usual cause is a limit of open descriptors, and nothing reports when
/// others are closed.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Tracks the last reply of the shim, so that the process exits after the client has received it. Clones share their
/// state.
///
/// A connection recognizes the reply by its stream id in the bytes that it writes. A stream id is unique only within
/// its connection, so a connection also checks that it has read a request to shut down with that id.
#[derive(Debug, Clone)]
pub(crate) struct LastReply(Arc<watch::Sender<Progress>>);

/// The progress of the last reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// No call has announced the last reply yet.
    Unknown,
    /// The reply on this ttrpc stream is the last one. It is not written yet.
    Expected(u32),
    /// It is written to the socket.
    Written,
    /// It is written, and the client has closed its connection.
    Closed,
}

impl LastReply {
    /// Starts without an expected reply.
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Progress::Unknown)))
    }

    /// Announces that the reply to the request with this header is the last one. Replies to other requests may
    /// still be written before it.
    pub(crate) fn expect(&self, request: &MessageHeader) {
        self.0.send_replace(Progress::Expected(request.stream_id));
    }

    /// Waits until the expected reply is written. Returns at once if none is expected.
    pub(crate) async fn written(&self) {
        self.wait_for(|progress| !matches!(progress, Progress::Expected(_)))
            .await;
    }

    /// Waits until the client that received the last reply has closed its connection. Returns at once if no reply
    /// was expected. If the shim closed it first, a Go client could report the end of the connection instead of the
    /// reply (`Client.dispatch` of containerd/ttrpc).
    pub(crate) async fn closed(&self) {
        self.wait_for(|progress| matches!(progress, Progress::Unknown | Progress::Closed))
            .await;
    }

    async fn wait_for(&self, condition: impl Fn(&Progress) -> bool) {
        // Fails only without a sender, which is a field of `self`.
        let _ = self.0.subscribe().wait_for(condition).await;
    }

    /// Notes that a message on ttrpc stream `stream` was written. Returns whether it is the last reply.
    fn note_written(&self, stream: u32) -> bool {
        self.0.send_if_modified(|progress| {
            let expected = *progress == Progress::Expected(stream);
            if expected {
                *progress = Progress::Written;
            }
            expected
        })
    }

    /// Notes that the connection that carried the last reply was closed.
    fn note_closed(&self) {
        self.0.send_replace(Progress::Closed);
    }
}

/// Accepts connections of processes with this process's user id only. Connections are tracked by `last_reply`.
///
/// # Errors
///
/// `listener` cannot be made non-blocking or registered with tokio.
pub(crate) fn accept_own_user(listener: StdUnixListener, last_reply: LastReply) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    Ok(Listener::new(OwnUserListener {
        listener: UnixListener::from_std(listener)?,
        last_reply,
        retry: None,
    }))
}

struct OwnUserListener {
    listener: UnixListener,
    last_reply: LastReply,
    /// Set after a failed accept(2), until one succeeds.
    retry: Option<Pin<Box<Sleep>>>,
}

impl Stream for OwnUserListener {
    type Item = io::Result<Connection>;

    /// Never yields an error: the server would try again at once, and log each attempt.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let own_uid = rustix::process::geteuid().as_raw();
        loop {
            if let Some(retry) = &mut self.retry
                && retry.as_mut().poll(context).is_pending()
            {
                return Poll::Pending;
            }
            let stream = match self.listener.poll_accept(context) {
                Poll::Ready(Ok((stream, _))) => stream,
                Poll::Ready(Err(error)) => {
                    if self.retry.is_none() {
                        let remedy = match error.raw_os_error() {
                            Some(libc::EMFILE) => ": raise LimitNOFILE of containerd's unit",
                            _ => "",
                        };
                        log::error!("cannot accept connections; trying again until it succeeds: {error}{remedy}");
                    }
                    self.retry = Some(Box::pin(tokio::time::sleep(ACCEPT_RETRY_DELAY)));
                    continue;
                }
                Poll::Pending => return Poll::Pending,
            };
            self.retry = None;
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == own_uid => {
                    return Poll::Ready(Some(Ok(Connection {
                        stream,
                        last_reply: self.last_reply.clone(),
                        header: HeaderStart::default(),
                        shutdown_requests: ShutdownRequests::default(),
                        carried_last_reply: false,
                    })));
                }
                Ok(peer) => log::warn!("refused a connection of uid {}", peer.uid()),
                Err(error) => log::warn!("refused a connection: its uid cannot be read: {error}"),
            }
        }
    }
}

struct Connection {
    stream: UnixStream,
    last_reply: LastReply,
    header: HeaderStart,
    shutdown_requests: ShutdownRequests,
    carried_last_reply: bool,
}

impl Connection {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut UnixStream> {
        Pin::new(&mut self.get_mut().stream)
    }

    fn on_close(&self) {
        if self.carried_last_reply {
            self.last_reply.note_closed();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.on_close();
    }
}

/// The first bytes of the message that is being written: length and stream id, big-endian
/// (containerd/ttrpc PROTOCOL.md).
#[derive(Debug, Default)]
struct HeaderStart {
    bytes: [u8; 8],
    length: usize,
}

impl HeaderStart {
    /// Adds bytes of the message. Bytes beyond the header's start are ignored.
    fn push(&mut self, written: &[u8]) {
        for (target, byte) in self.bytes[self.length..].iter_mut().zip(written) {
            *target = *byte;
            self.length += 1;
        }
    }

    /// Returns the stream id of a message that is complete, and begins the next message.
    fn take_stream_id(&mut self) -> Option<u32> {
        let [_, _, _, _, stream @ ..] = self.bytes;
        (std::mem::take(&mut self.length) == self.bytes.len()).then_some(u32::from_be_bytes(stream))
    }
}

/// The requests to shut down among the messages that a client sends.
#[derive(Debug, Default)]
struct ShutdownRequests {
    /// The header of the message that is being read, as far as it has arrived.
    header: Vec<u8>,
    /// The first bytes of that message's payload, which name service and method.
    payload_start: Vec<u8>,
    /// How many bytes of that message's payload are still to come.
    left: usize,
    /// The stream ids of the requests to shut down that have no reply yet.
    streams: HashSet<u32>,
}

/// The size of a ttrpc header: length, stream id, type and flags (containerd/ttrpc PROTOCOL.md), in bytes.
const HEADER_SIZE: usize = 10;

/// How many bytes of a request contain the names of its service and method, which come first.
const NAMES_SIZE: usize = 128;

impl ShutdownRequests {
    /// Adds bytes that the client sent.
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.header.len() < HEADER_SIZE {
                let (part, rest) = bytes.split_at(bytes.len().min(HEADER_SIZE - self.header.len()));
                self.header.extend_from_slice(part);
                bytes = rest;
                if let Some([length @ .., _, _, _, _, _, _]) = self.header.first_chunk::<HEADER_SIZE>() {
                    self.left = u32::from_be_bytes(*length) as usize;
                }
            } else {
                let (part, rest) = bytes.split_at(bytes.len().min(self.left));
                let names = &part[..part.len().min(NAMES_SIZE - self.payload_start.len())];
                self.payload_start.extend_from_slice(names);
                self.left -= part.len();
                bytes = rest;
            }
            if self.header.len() == HEADER_SIZE && self.left == 0 {
                self.end_message();
            }
        }
    }

    fn end_message(&mut self) {
        const METHOD: &[u8] = b"Shutdown";
        if let [_, _, _, _, stream @ .., kind, _] = &self.header[..]
            && let Ok(stream) = stream.try_into()
            && *kind == MESSAGE_TYPE_REQUEST
            && self.payload_start.windows(METHOD.len()).any(|window| window == METHOD)
        {
            self.streams.insert(u32::from_be_bytes(stream));
        }
        self.header.clear();
        self.payload_start.clear();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let poll = self.as_mut().stream().poll_read(context, buffer);
        if poll.is_ready() {
            let new = &buffer.filled()[before..];
            if new.is_empty() {
                self.on_close();
            }
            self.shutdown_requests.push(new);
        }
        poll
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = self.as_mut().stream().poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = poll {
            self.header.push(&bytes[..count]);
        }
        poll
    }

    // The ttrpc crate flushes after each complete message.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = self.as_mut().stream().poll_flush(context);
        if poll.is_ready()
            && let Some(stream) = self.header.take_stream_id()
            && self.shutdown_requests.streams.remove(&stream)
        {
            self.carried_last_reply |= self.last_reply.note_written(stream);
        }
        poll
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    fn connection(stream: UnixStream, last_reply: &LastReply) -> Connection {
        Connection {
            stream,
            last_reply: last_reply.clone(),
            header: HeaderStart::default(),
            shutdown_requests: ShutdownRequests::default(),
            carried_last_reply: false,
        }
    }

    fn message(mut header: MessageHeader, payload: &[u8]) -> Vec<u8> {
        header.length = u32::try_from(payload.len()).unwrap();
        [Vec::from(header), payload.to_vec()].concat()
    }

    /// Sends a request on `stream`, and lets the server read it.
    async fn send_request(client: &mut UnixStream, server: &mut Connection, stream: u32, method: &str) {
        let bytes = message(
            MessageHeader::new_request(stream, 0),
            format!("Task {method}").as_bytes(),
        );
        client.write_all(&bytes).await.unwrap();
        // In small parts.
        let mut read = 0;
        while read < bytes.len() {
            read += server.read(&mut [0; 7]).await.unwrap();
        }
    }

    async fn write_reply(server: &mut Connection, stream: u32) {
        let bytes = message(MessageHeader::new_response(stream, 0), b"abc");
        // In two parts, as ttrpc writes it.
        server.write_all(&bytes[..7]).await.unwrap();
        server.write_all(&bytes[7..]).await.unwrap();
        server.flush().await.unwrap();
    }

    #[tokio::test]
    async fn failed_accept_is_tried_again_after_a_delay() {
        // It is readable, and each accept(2) fails with EINVAL, because it does not listen.
        let (socket, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut peer, b"x").unwrap();
        socket.set_nonblocking(true).unwrap();
        let listener = StdUnixListener::from(std::os::fd::OwnedFd::from(socket));
        let mut listener = OwnUserListener {
            listener: UnixListener::from_std(listener).unwrap(),
            last_reply: LastReply::new(),
            retry: None,
        };
        let mut polls = 0;
        let next = std::future::poll_fn(|context| {
            polls += 1;
            Pin::new(&mut listener).poll_next(context)
        });

        tokio::time::pause();
        let accepted = timeout(10 * ACCEPT_RETRY_DELAY, next).await;

        assert!(accepted.is_err(), "an error was passed on");
        assert!((5..20).contains(&polls), "{polls}");
    }

    #[tokio::test]
    async fn reply_of_another_connection_with_the_same_stream_id_is_not_the_last_one() {
        let last_reply = LastReply::new();
        let (stream, mut client) = UnixStream::pair().unwrap();
        let (other_stream, mut other_client) = UnixStream::pair().unwrap();
        let mut server = connection(stream, &last_reply);
        let mut other = connection(other_stream, &last_reply);
        send_request(&mut other_client, &mut other, 5, "Wait").await;
        send_request(&mut client, &mut server, 5, "Shutdown").await;
        last_reply.expect(&MessageHeader::new_request(5, 0));
        let short = Duration::from_millis(50);

        write_reply(&mut other, 5).await;
        assert!(timeout(short, last_reply.written()).await.is_err());
        write_reply(&mut server, 5).await;

        timeout(short, last_reply.written()).await.unwrap();
    }

    #[tokio::test]
    async fn only_the_expected_reply_counts_as_the_last_one() {
        let last_reply = LastReply::new();
        let (stream, mut peer) = UnixStream::pair().unwrap();
        let mut connection = connection(stream, &last_reply);
        for stream in [1, 3, 5] {
            send_request(&mut peer, &mut connection, stream, "ShutdownSandbox").await;
        }
        let short = Duration::from_millis(50);

        write_reply(&mut connection, 1).await;
        last_reply.written().await;
        last_reply.expect(&MessageHeader::new_request(5, 0));
        write_reply(&mut connection, 3).await;
        assert!(
            timeout(short, last_reply.written()).await.is_err(),
            "another reply counts as the last one"
        );
        write_reply(&mut connection, 5).await;

        timeout(short, last_reply.written()).await.unwrap();
        assert!(
            timeout(short, last_reply.closed()).await.is_err(),
            "the connection is open"
        );
        drop(peer);
        let end = connection.read(&mut [0; 8]).await;
        timeout(short, last_reply.closed()).await.unwrap();
        // The peer closed with unread bytes, which the kernel may report as ECONNRESET.
        assert!(matches!(end, Ok(0)) || end.is_err());
    }
}
