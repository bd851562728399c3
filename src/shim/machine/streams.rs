//! The streams of a machine: which host ports are open and what became of them.

use std::collections::HashMap;

use parking_lot::{Mutex, MutexGuard};

use nutshell_protocol::FIRST_STREAM_PORT;
use tokio::sync::watch;

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// What was asked to be drained was delivered.
    Drained,
    Closed,
}

/// One stream of a process. Clones are the same stream.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    port: u32,
    phase: watch::Receiver<Phase>,
}

impl Stream {
    /// The host port that the guest connects to.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Nothing more will come out of it.
    pub(crate) fn is_closed(&self) -> bool {
        *self.phase.borrow() == Phase::Closed
    }

    /// Waits until it is closed.
    pub(crate) async fn closed(&mut self) {
        self.reaches(|phase| phase == Phase::Closed).await;
    }

    /// Waits until what was asked to be drained was delivered, or it is closed.
    pub(super) async fn drained(&mut self) {
        self.reaches(|phase| phase != Phase::Open).await;
    }

    async fn reaches(&mut self, wanted: impl Fn(Phase) -> bool) {
        // An error means that the machine is forgotten: then all is closed.
        let _ = self.phase.wait_for(|phase| wanted(*phase)).await;
    }
}

/// All streams of a machine.
#[derive(Debug, Default)]
pub(super) struct Streams {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// How many there ever were: no port is used twice.
    opened: u32,
    /// The machine is gone.
    over: bool,
    open: HashMap<u32, watch::Sender<Phase>>,
}

impl Streams {
    /// A new stream, closed from the start if the machine is gone.
    pub(super) fn add(&self) -> Stream {
        let mut table = self.table();
        let port = FIRST_STREAM_PORT.saturating_add(table.opened);
        table.opened = table.opened.saturating_add(1);
        let (sender, phase) = watch::channel(if table.over { Phase::Closed } else { Phase::Open });
        if !table.over {
            table.open.insert(port, sender);
        }
        Stream { port, phase }
    }

    pub(super) fn drained(&self, port: u32) {
        if let Some(stream) = self.table().open.get(&port) {
            stream.send_replace(Phase::Drained);
        }
    }

    pub(super) fn closed(&self, port: u32) {
        if let Some(stream) = self.table().open.remove(&port) {
            stream.send_replace(Phase::Closed);
        }
    }

    pub(super) fn close_all(&self) {
        let mut table = self.table();
        table.over = true;
        for (_, stream) in table.open.drain() {
            stream.send_replace(Phase::Closed);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drained_stream_still_waits_for_its_end() {
        let streams = Streams::default();
        let (mut first, second) = (streams.add(), streams.add());
        assert_eq!(
            (first.port(), second.port()),
            (FIRST_STREAM_PORT, FIRST_STREAM_PORT + 1)
        );

        streams.drained(first.port());
        first.drained().await;
        assert!(!first.is_closed());
        streams.closed(first.port());
        first.closed().await;
        assert!(!second.is_closed());
    }

    #[tokio::test]
    async fn end_of_the_machine_closes_streams_of_before_and_after() {
        let streams = Streams::default();
        let mut before = streams.add();
        streams.close_all();
        before.drained().await;
        before.closed().await;
        assert!(streams.add().is_closed());
    }

    #[test]
    fn notices_about_unknown_ports_change_nothing() {
        let streams = Streams::default();
        let stream = streams.add();
        streams.drained(7);
        streams.closed(7);
        streams.closed(stream.port());
        streams.closed(stream.port());
        assert!(stream.is_closed());
        assert!(streams.table().open.is_empty());
    }
}
