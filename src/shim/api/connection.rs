//! Connections of containerd: who may connect, and when what was answered is really on its way.

use std::{
    io,
    os::unix::net::UnixListener as StdUnixListener,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use containerd_shim::protos::ttrpc::{MessageHeader, asynchronous::transport::Listener};
use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
};

/// Follows one message among those that are written to sockets, so that the process can end after its
/// last reply was taken and not before.
#[derive(Debug, Clone)]
pub(crate) struct Written(Arc<watch::Sender<LastReply>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastReply {
    /// Nobody has asked yet what the last one is.
    Unknown,
    /// The reply on this stream of ttrpc is not written yet.
    Expected(u32),
    /// It is.
    Written,
    /// Who asked has closed the connection since.
    Taken,
}

impl Written {
    /// Nothing is expected yet.
    pub(crate) fn none() -> Self {
        Self(Arc::new(watch::Sender::new(LastReply::Unknown)))
    }

    /// Called by who is about to reply for the last time, to the request with this header. Others may
    /// still reply meanwhile.
    pub(crate) fn expect(&self, request: &MessageHeader) {
        self.0.send_replace(LastReply::Expected(request.stream_id));
    }

    /// Waits until the reply that was expected is written.
    pub(crate) async fn last(&self) {
        self.wait(|last| !matches!(last, LastReply::Expected(_))).await;
    }

    /// Waits until who asked for it has closed the connection: a client of Go that sees the end of a
    /// connection may report that and forget the reply before it (`Client.dispatch` of containerd/ttrpc).
    pub(crate) async fn taken(&self) {
        self.wait(|last| matches!(last, LastReply::Unknown | LastReply::Taken))
            .await;
    }

    async fn wait(&self, reached: impl Fn(&LastReply) -> bool) {
        // Fails only if the sender is gone, which is borrowed with `self`.
        let _ = self.0.subscribe().wait_for(reached).await;
    }

    /// Whether a message that was written is the one.
    fn message(&self, stream: u32) -> bool {
        self.0.send_if_modified(|last| {
            let expected = *last == LastReply::Expected(stream);
            if expected {
                *last = LastReply::Written;
            }
            expected
        })
    }
}

/// Connections to `listener` of processes with this process's user id; others are refused.
pub(crate) fn listener(listener: StdUnixListener, written: Written) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    Ok(Listener::new(Accepted {
        listener: UnixListener::from_std(listener)?,
        written,
    }))
}

struct Accepted {
    listener: UnixListener,
    written: Written,
}

impl Stream for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let own = rustix::process::geteuid().as_raw();
        loop {
            let (stream, _) = match self.listener.poll_accept(context) {
                Poll::Ready(accepted) => accepted?,
                Poll::Pending => return Poll::Pending,
            };
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == own => {
                    return Poll::Ready(Some(Ok(Connection {
                        stream,
                        written: self.written.clone(),
                        start: Start::default(),
                        had_last: false,
                    })));
                }
                Ok(peer) => log::warn!("refused a connection of user {}", peer.uid()),
                Err(error) => log::warn!("refused a connection of an unknown user: {error}"),
            }
        }
    }
}

struct Connection {
    stream: UnixStream,
    written: Written,
    start: Start,
    /// The last reply went out here.
    had_last: bool,
}

impl Connection {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut UnixStream> {
        Pin::new(&mut self.get_mut().stream)
    }

    fn ended(&self) {
        if self.had_last {
            self.written.0.send_replace(LastReply::Taken);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.ended();
    }
}

/// The first bytes of the message that is being written: its length and its stream's number, in network
/// order (containerd/ttrpc PROTOCOL.md).
#[derive(Debug, Default)]
struct Start {
    bytes: [u8; 8],
    length: usize,
}

impl Start {
    fn push(&mut self, written: &[u8]) {
        for (place, byte) in self.bytes[self.length..].iter_mut().zip(written) {
            *place = *byte;
            self.length += 1;
        }
    }

    /// The stream's number, once per message.
    fn take(&mut self) -> Option<u32> {
        let [_, _, _, _, stream @ ..] = self.bytes;
        (std::mem::take(&mut self.length) == self.bytes.len()).then_some(u32::from_be_bytes(stream))
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
        if poll.is_ready() && buffer.filled().len() == before {
            self.ended();
        }
        poll
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = self.as_mut().stream().poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = poll {
            self.start.push(&bytes[..count]);
        }
        poll
    }

    // The ttrpc crate flushes after each whole message.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = self.as_mut().stream().poll_flush(context);
        if poll.is_ready()
            && let Some(stream) = self.start.take()
        {
            self.had_last |= self.written.message(stream);
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

    #[tokio::test]
    async fn last_reply_is_the_one_that_was_asked_for_and_not_one_that_comes_before() {
        let written = Written::none();
        let (stream, peer) = UnixStream::pair().unwrap();
        let mut connection = Connection {
            stream,
            written: written.clone(),
            start: Start::default(),
            had_last: false,
        };
        let mut reply = async |stream: u32| {
            let mut message = MessageHeader::new_response(stream, 3);
            message.length = 3;
            // As ttrpc writes it: in two parts.
            let bytes = [Vec::from(message), b"abc".to_vec()].concat();
            connection.write_all(&bytes[..7]).await.unwrap();
            connection.write_all(&bytes[7..]).await.unwrap();
            connection.flush().await.unwrap();
        };
        let now = Duration::from_millis(50);

        reply(1).await;
        written.last().await;
        written.expect(&MessageHeader::new_request(5, 0));
        reply(3).await;
        assert!(timeout(now, written.last()).await.is_err(), "another reply");
        reply(5).await;

        timeout(now, written.last()).await.unwrap();
        assert!(timeout(now, written.taken()).await.is_err(), "not closed");
        drop(peer);
        let end = connection.read(&mut [0; 8]).await;
        timeout(now, written.taken()).await.unwrap();
        // What was not read before is forgotten, and said so once.
        assert!(matches!(end, Ok(0)) || end.is_err());
    }
}
