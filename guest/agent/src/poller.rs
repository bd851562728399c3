//! Waits for events with epoll(7), and identifies their sources.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{Timespec, epoll};

/// Identifies the source of an event. Source numbers are not reused, so a late event of a removed source is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    /// The agent stream, to the shim.
    Host,
    /// SIGCHLD: a child has ended.
    Signals,
    /// A job has sent its report.
    Job(u32),
    /// The source or sink of a pump is ready.
    Pump(u32),
    /// The `memory.events` of a container's cgroup have changed.
    Memory(u32),
    /// A temporary rate of the clock has ended.
    Clock,
}

impl Token {
    fn encode(self) -> epoll::EventData {
        let (kind, number): (u64, u32) = match self {
            Self::Host => (0, 0),
            Self::Signals => (1, 0),
            Self::Job(number) => (2, number),
            Self::Pump(number) => (3, number),
            Self::Memory(number) => (4, number),
            Self::Clock => (5, 0),
        };
        epoll::EventData::new_u64((kind << 32) | u64::from(number))
    }

    fn decode(data: epoll::EventData) -> Option<Self> {
        let data = data.u64();
        let number = u32::try_from(data & u64::from(u32::MAX)).ok()?;
        match data >> 32 {
            0 => Some(Self::Host),
            1 => Some(Self::Signals),
            2 => Some(Self::Job(number)),
            3 => Some(Self::Pump(number)),
            4 => Some(Self::Memory(number)),
            5 => Some(Self::Clock),
            _ => None,
        }
    }
}

/// The maximum number of events that one call of epoll_wait(2) returns.
const MAX_EVENTS_PER_WAIT: usize = 32;

/// An epoll instance.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// Creates an instance without sources.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// Reports each change of readiness, for reading or writing, once (edge-triggered). The receiver of the event
    /// must read and write until the descriptor would block.
    pub(crate) fn watch_changes(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let changes = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
        self.add(fd, token, changes | epoll::EventFlags::ET)
    }

    /// Reports as long as there is data to read (level-triggered).
    pub(crate) fn watch_input(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, epoll::EventFlags::IN)
    }

    /// Reports when a cgroup file has changed since it was last read (cgroup v2, "Basic Operations").
    pub(crate) fn watch_cgroup_file(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, epoll::EventFlags::PRI | epoll::EventFlags::ET)
    }

    fn add(&self, fd: impl AsFd, token: Token, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, token.encode(), flags)?)
    }

    /// Waits for events if `block` is true; otherwise returns the pending events. The list may be empty.
    pub(crate) fn wait(&self, block: bool) -> io::Result<Vec<Token>> {
        let mut events = Vec::with_capacity(MAX_EVENTS_PER_WAIT);
        let timeout = (!block).then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(events
            .into_iter()
            .filter_map(|event| Token::decode(event.data))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_decoded_as_they_were_encoded() {
        for token in [
            Token::Host,
            Token::Signals,
            Token::Job(0),
            Token::Pump(u32::MAX),
            Token::Memory(7),
            Token::Clock,
        ] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }
}
