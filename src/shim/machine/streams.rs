//! The byte streams between host and guest: which vsock ports of the host are open, and the state of each.

use std::{collections::HashMap, io};

use nutshell_protocol::MIN_STREAM_PORT;
use parking_lot::{Mutex, MutexGuard};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamState {
    Open,
    /// The bytes of the last `Command::Drain` were written.
    Drained,
    Closed,
}

/// A handle to one stream. Clones refer to the same stream.
#[derive(Debug, Clone)]
pub(crate) struct GuestStream {
    port: u32,
    state: watch::Receiver<StreamState>,
}

impl GuestStream {
    /// The vsock port of the host that the guest connects to.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Whether no more bytes will come out of it.
    pub(crate) fn is_closed(&self) -> bool {
        *self.state.borrow() == StreamState::Closed
    }

    /// Waits until it is closed.
    pub(crate) async fn closed(&mut self) {
        self.wait_for(|state| state == StreamState::Closed).await;
    }

    /// Waits until the bytes of the last `Command::Drain` were written, or it is closed.
    pub(super) async fn drained(&mut self) {
        self.wait_for(|state| state != StreamState::Open).await;
    }

    async fn wait_for(&mut self, is_reached: impl Fn(StreamState) -> bool) {
        // An error means that the machine was dropped, and with it all streams.
        let _ = self.state.wait_for(|state| is_reached(*state)).await;
    }
}

/// All streams of a machine.
#[derive(Debug, Default)]
pub(super) struct StreamTable {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The machine has ended.
    ended: bool,
    open: HashMap<u32, watch::Sender<StreamState>>,
}

impl Inner {
    /// A random port that is not open. The first connection to a port gets its stream, and any container can connect to
    /// ports of the host: it must not be able to guess one before the agent connects.
    fn unused_port(&self) -> io::Result<u32> {
        loop {
            let mut bytes = [0; 4];
            getrandom(&mut bytes, GetRandomFlags::empty())?;
            let port = u32::from_ne_bytes(bytes);
            // The highest number means "any port" (vsock(7), `VMADDR_PORT_ANY`).
            if (MIN_STREAM_PORT..u32::MAX).contains(&port) && !self.open.contains_key(&port) {
                return Ok(port);
            }
        }
    }
}

impl StreamTable {
    /// A new stream. It is closed already if the machine has ended. An error is that of getrandom(2).
    pub(super) fn open(&self) -> io::Result<GuestStream> {
        let mut inner = self.lock();
        let port = inner.unused_port()?;
        let state = if inner.ended {
            StreamState::Closed
        } else {
            StreamState::Open
        };
        let (sender, state) = watch::channel(state);
        if !inner.ended {
            inner.open.insert(port, sender);
        }
        Ok(GuestStream { port, state })
    }

    pub(super) fn mark_drained(&self, port: u32) {
        if let Some(stream) = self.lock().open.get(&port) {
            stream.send_replace(StreamState::Drained);
        }
    }

    pub(super) fn mark_closed(&self, port: u32) {
        if let Some(stream) = self.lock().open.remove(&port) {
            stream.send_replace(StreamState::Closed);
        }
    }

    /// Closes the open streams and all that are opened later: the machine has ended.
    pub(super) fn close_all(&self) {
        let mut inner = self.lock();
        inner.ended = true;
        for (_, stream) in inner.open.drain() {
            stream.send_replace(StreamState::Closed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drained_stream_is_open_until_it_is_closed() {
        let streams = StreamTable::default();
        let (mut first, second) = (streams.open().unwrap(), streams.open().unwrap());
        assert_ne!(first.port(), second.port());

        streams.mark_drained(first.port());
        first.drained().await;
        assert!(!first.is_closed());
        streams.mark_closed(first.port());
        first.closed().await;
        assert!(!second.is_closed());
    }

    #[test]
    fn ports_cannot_be_guessed_from_earlier_ones() {
        let streams = StreamTable::default();
        let ports: Vec<_> = (0..1000).map(|_| streams.open().unwrap().port()).collect();
        assert!(ports.iter().all(|port| *port >= MIN_STREAM_PORT && *port < u32::MAX));
        let close = |pair: &[u32]| pair[0].abs_diff(pair[1]) < 1 << 16;
        // About 0.03 of 999 pairs are so close by chance.
        assert!(ports.windows(2).filter(|pair| close(pair)).count() < 5, "{ports:?}");
    }

    #[tokio::test]
    async fn end_of_machine_closes_open_and_later_streams() {
        let streams = StreamTable::default();
        let mut before = streams.open().unwrap();
        streams.close_all();
        before.drained().await;
        before.closed().await;
        assert!(streams.open().unwrap().is_closed());
    }

    #[test]
    fn notices_about_unknown_ports_change_nothing() {
        let streams = StreamTable::default();
        let stream = streams.open().unwrap();
        streams.mark_drained(7);
        streams.mark_closed(7);
        streams.mark_closed(stream.port());
        streams.mark_closed(stream.port());
        assert!(stream.is_closed());
        assert!(streams.lock().open.is_empty());
    }
}
