//! Connections of containerd: who may connect, and when what was answered is really on its way.

use std::{
    future::Future,
    io,
    os::unix::net::UnixListener as StdUnixListener,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
};

use super::log;

/// Counts the messages that were written to a socket in full: whoever has answered the last call
/// waits here before the process ends.
#[derive(Debug, Clone)]
pub(crate) struct Written(Arc<watch::Sender<u64>>);

impl Written {
    /// Nothing was written yet.
    pub(crate) fn none() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Completes with the next message written after this call.
    pub(crate) fn next(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut receiver = self.0.subscribe();
        receiver.mark_unchanged();
        async move {
            // Fails only where no connection is left to write.
            let _ = receiver.changed().await;
        }
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
                    })));
                }
                Ok(peer) => log::warn(&format!("refused a connection of user {}", peer.uid())),
                Err(error) => log::warn(&format!("refused a connection of an unknown user: {error}")),
            }
        }
    }
}

struct Connection {
    stream: UnixStream,
    written: Written,
}

impl Connection {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut UnixStream> {
        Pin::new(&mut self.get_mut().stream)
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    // The ttrpc crate flushes after each whole message.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = self.as_mut().stream().poll_flush(context);
        if poll.is_ready() {
            self.written.0.send_modify(|count| *count += 1);
        }
        poll
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}
