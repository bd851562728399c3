//! The counters of a device, and the obstacles that keep its queues from being served. The device's threads update
//! them, and the vmm reads them in its event loop.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::stall_timer::StallTimer;
use crate::control::DeviceCounters;

/// What keeps a queue with available chains from being served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Obstacle {
    HostRead,
    HostWrite,
    HostFlush,
    HostDiscard,
    /// Packets wait for the guest, which provides no buffers for them.
    NoGuestBuffers,
}

const OBSTACLES: [Obstacle; 5] = [
    Obstacle::HostRead,
    Obstacle::HostWrite,
    Obstacle::HostFlush,
    Obstacle::HostDiscard,
    Obstacle::NoGuestBuffers,
];

impl Obstacle {
    /// The reason of a stall, and what to do about it, for the log.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::HostRead => "a read of the disk's file does not return: check the storage of the host",
            Self::HostWrite => "a write to the disk's file does not return: check the storage of the host",
            Self::HostFlush => "a flush of the disk's file does not return: check the storage of the host",
            Self::HostDiscard => {
                "a discard or zeroing of the disk's file does not return: check the storage of the host"
            }
            Self::NoGuestBuffers => "packets wait, but the guest takes none: it hangs, or is out of memory",
        }
    }
}

/// A queue's used ring, and how many of its chains the driver has taken.
pub(crate) trait UsedChains: Debug + Send {
    /// The number of used chains that the driver has not taken, and the index up to which it has taken them.
    /// `None` if the rings cannot be read.
    fn untaken(&self) -> Option<(u16, u16)>;
}

/// Work of a device that has not ended yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    /// The queue or stream.
    pub(crate) place: String,
    /// Any value that changes when the place makes progress.
    pub(crate) progress: u64,
    /// Why it waits, if known, and what to do about it.
    pub(crate) reason: String,
}

/// The counters of a device. They start at zero when the device is created, and only grow.
#[derive(Debug)]
pub(crate) struct Counters {
    name: String,
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
    stalls: AtomicU64,
    queues: Box<[QueueState]>,
    timer: Option<Arc<StallTimer>>,
}

/// Whether a queue waits. One thread writes it.
#[derive(Debug, Default)]
struct QueueState {
    /// Odd while the queue waits. Grows with each wait.
    waits: AtomicU64,
    /// An [`Obstacle`], of the last wait.
    obstacle: AtomicU8,
    /// `None` if the driver need not take used chains soon.
    used_chains: Mutex<Option<Box<dyn UsedChains>>>,
}

impl Counters {
    /// The counters of a device whose requests end before it returns to the event loop, so that no queue waits. `name`
    /// is the device's name for users and in the log.
    pub(crate) fn new(name: impl Into<String>) -> Arc<Self> {
        Arc::new(Self::build(name.into(), 0, None))
    }

    /// The counters of a device with `queues` queues that may wait. `timer` is started when one of them does.
    pub(crate) fn with_queues(name: impl Into<String>, queues: usize, timer: &Arc<StallTimer>) -> Arc<Self> {
        Arc::new(Self::build(name.into(), queues, Some(timer.clone())))
    }

    fn build(name: String, queues: usize, timer: Option<Arc<StallTimer>>) -> Self {
        Self {
            name,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes_to_guest: AtomicU64::new(0),
            bytes_from_guest: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            queues: (0..queues).map(|_| QueueState::default()).collect(),
            timer,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Counts requests or packets.
    pub(crate) fn add_requests(&self, count: u64) {
        self.requests.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts a request that failed, data that was lost, or a queue that is no longer served.
    pub(crate) fn add_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes that the guest received.
    pub(crate) fn add_bytes_to_guest(&self, bytes: u64) {
        self.bytes_to_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that the guest sent.
    pub(crate) fn add_bytes_from_guest(&self, bytes: u64) {
        self.bytes_from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_stall(&self) {
        self.stalls.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that `queue` waits from now on. Only the thread that serves the queue calls this and [`Self::resume`].
    pub(crate) fn wait(&self, queue: u16, obstacle: Obstacle) {
        if let Some(state) = self.queues.get(usize::from(queue))
            && !state.is_waiting()
        {
            state.obstacle.store(obstacle as u8, Ordering::Relaxed);
            // Before the check of the timer: see `StallTimer::expire`.
            state.waits.fetch_add(1, Ordering::SeqCst);
            self.watch();
        }
    }

    /// Records that `queue` no longer waits. Does nothing if it did not.
    pub(crate) fn resume(&self, queue: u16) {
        if let Some(state) = self.queues.get(usize::from(queue))
            && state.is_waiting()
        {
            state.waits.fetch_add(1, Ordering::Release);
        }
    }

    /// From now on a queue is also pending while its driver does not take used chains. `None` ends that.
    pub(crate) fn watch_used_chains(&self, queue: u16, used_chains: Option<Box<dyn UsedChains>>) {
        if let Some(state) = self.queues.get(usize::from(queue)) {
            *state.used_chains.lock() = used_chains;
        }
    }

    /// Makes the vmm check the device for stalls after a while.
    pub(crate) fn watch(&self) {
        if let Some(timer) = &self.timer {
            timer.start();
        }
    }

    /// The queues that wait for an [`Obstacle`], or whose driver does not take used chains.
    pub(crate) fn pending(&self) -> Vec<Pending> {
        let queues = self.queues.iter().enumerate();
        let waiting = queues.filter_map(|(index, state)| {
            let progress = state.waits.load(Ordering::SeqCst);
            let obstacle = state.obstacle.load(Ordering::Relaxed);
            let obstacle = OBSTACLES.into_iter().find(|candidate| *candidate as u8 == obstacle)?;
            let (progress, reason) = if progress % 2 == 1 {
                (progress, obstacle.describe().to_owned())
            } else {
                let (count, taken) = state.used_chains.lock().as_ref()?.untaken()?;
                let hangs =
                    format!("the guest has not taken its completed requests ({count}) from the used ring: it may hang");
                // Differs from each number of waits, so that a wait that begins or ends is progress too.
                (count > 0).then(|| (u64::MAX - u64::from(taken), hangs))?
            };
            Some(Pending {
                place: format!("queue {index}"),
                progress,
                reason,
            })
        });
        waiting.collect()
    }

    /// The current values.
    pub(crate) fn read(&self) -> DeviceCounters {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceCounters {
            name: self.name.clone(),
            requests: value(&self.requests),
            errors: value(&self.errors),
            bytes_to_guest: value(&self.bytes_to_guest),
            bytes_from_guest: value(&self.bytes_from_guest),
            stalls: value(&self.stalls),
        }
    }
}

impl QueueState {
    fn is_waiting(&self) -> bool {
        self.waits.load(Ordering::Relaxed) % 2 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_is_pending_from_wait_to_resume_and_each_wait_is_progress() {
        let timer = Arc::new(StallTimer::new().unwrap());
        let counters = Counters::with_queues("disk", 2, &timer);
        counters.resume(1);
        assert_eq!(counters.pending(), []);
        assert!(!timer.is_running());

        counters.wait(1, Obstacle::HostWrite);
        counters.wait(1, Obstacle::HostRead);

        let pending = counters.pending();
        assert_eq!(pending.len(), 1);
        assert_eq!(pending[0].place, "queue 1");
        assert!(pending[0].reason.starts_with("a write"), "{pending:?}");
        assert!(timer.is_running());

        counters.resume(1);
        assert_eq!(counters.pending(), []);
        counters.wait(1, Obstacle::HostWrite);
        assert_ne!(counters.pending()[0].progress, pending[0].progress);
    }
}
