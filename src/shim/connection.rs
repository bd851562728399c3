//! Connections of containerd: who may connect, and when what was answered is really on its way.

use std::{
    io,
    os::unix::net::UnixListener as StdUnixListener,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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

/// Counts the messages that were written to a socket in full, so that the process can end after its
/// last reply and not before.
#[derive(Debug, Clone)]
pub(crate) struct Written(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    written: watch::Sender<u64>,
    wanted: AtomicU64,
}

impl Written {
    /// Nothing was written yet.
    pub(crate) fn none() -> Self {
        Self(Arc::new(Counts {
            written: watch::Sender::new(0),
            wanted: AtomicU64::new(0),
        }))
    }

    /// Called by who is about to reply for the last time.
    pub(crate) fn expect_one_more(&self) {
        let next = *self.0.written.borrow() + 1;
        self.0.wanted.store(next, Ordering::Relaxed);
    }

    /// Waits until the message that was expected is written.
    pub(crate) async fn all(&self) {
        let wanted = self.0.wanted.load(Ordering::Relaxed);
        let mut written = self.0.written.subscribe();
        // Fails only if the sender is gone, which is borrowed with `self`.
        let _ = written.wait_for(|count| *count >= wanted).await;
    }

    fn count(&self) {
        self.0.written.send_modify(|count| *count += 1);
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
            self.written.count();
        }
        poll
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}
