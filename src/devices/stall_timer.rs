//! The timer that makes the vmm look for stalled queues. It runs only after a queue has begun to wait, so a machine
//! that does nothing is not woken.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// How long after the start of the timer the vmm looks for stalls. If something still waits then, the vmm starts the
/// timer again.
pub(crate) const STALL_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct StallTimer {
    timer: OwnedFd,
    running: AtomicBool,
}

impl StallTimer {
    /// A timer that does not run.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            running: AtomicBool::new(false),
        })
    }

    /// Starts the timer unless it runs. If it runs, this costs one atomic load.
    pub(crate) fn start(&self) {
        if self.running.load(Ordering::SeqCst) || self.running.swap(true, Ordering::SeqCst) {
            return;
        }
        let value = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: STALL_INTERVAL.as_secs().cast_signed(),
                tv_nsec: 0,
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            self.running.store(false, Ordering::SeqCst);
            log::warn!(target: "virtual machine", "stalled queues are not reported: cannot start the timer: {error}");
        }
    }

    /// Stops the timer after [`Self::as_fd`] has become readable. Look for waiting queues afterwards, not before: a
    /// queue that begins to wait after this call starts the timer again.
    pub(crate) fn expire(&self) {
        // Clears readiness. There is nothing to read if the timer was started again, which is harmless.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.running.store(false, Ordering::SeqCst);
    }

    #[cfg(test)]
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

impl AsFd for StallTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
