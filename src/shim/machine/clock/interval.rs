//! A timer with which each wait wakes the shim once. With a timer of Tokio, a wait wakes it two or three times: as the
//! end comes closer, the timer moves to finer levels of a timer wheel.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use tokio::io::{Interest, unix::AsyncFd};

#[derive(Debug)]
pub(super) struct IntervalTimer(AsyncFd<OwnedFd>);

impl IntervalTimer {
    /// Needs the Tokio runtime.
    pub(super) fn new() -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        // SAFETY: an `OwnedFd` stays open and the same descriptor while it is owned, and `AsyncFd` owns it from here
        // on.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?;
        Ok(Self(timer))
    }

    /// Waits for `time`. Another call replaces a wait that was dropped.
    pub(super) async fn sleep(&self, time: Duration) -> io::Result<()> {
        // A time of zero would disarm the timer.
        let nanoseconds = i64::try_from(time.as_nanos()).unwrap_or(i64::MAX).max(1);
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: nanoseconds / 1_000_000_000,
                tv_nsec: nanoseconds % 1_000_000_000,
            },
        };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                // The next call waits without trying to read first.
                Ok(_) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn timer_ends_after_its_time_also_after_a_dropped_wait() {
        let timer = IntervalTimer::new().unwrap();
        let dropped = tokio::time::timeout(Duration::from_millis(5), timer.sleep(Duration::from_secs(60))).await;
        assert!(dropped.is_err());
        for milliseconds in [0, 1, 30] {
            let (start, time) = (Instant::now(), Duration::from_millis(milliseconds));
            timer.sleep(time).await.unwrap();
            assert!(start.elapsed() >= time, "{time:?}: {:?}", start.elapsed());
            assert!(start.elapsed() < Duration::from_secs(30));
        }
    }
}
