//! Reports jumps of the host's clock.

use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Reports jumps of the host's clock: a timer that the kernel cancels when the clock is set (timerfd_create(2),
/// `TFD_TIMER_CANCEL_ON_SET`).
#[derive(Debug)]
pub(in crate::shim::machine) struct ClockJumps(AsyncFd<OwnedFd>);

impl ClockJumps {
    /// Watches from now on. Needs the Tokio runtime.
    pub(in crate::shim::machine) fn watch() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // Centuries away, so that only a jump makes the timer readable.
        let never = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::MAX / 1_000_000_000,
                tv_nsec: 0,
            },
        };
        timerfd_settime(
            &timer,
            TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET,
            &never,
        )?;
        // SAFETY: an `OwnedFd` stays open and the same descriptor while it is owned, and `AsyncFd` owns it from here
        // on.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?;
        Ok(Self(timer))
    }

    /// Waits for the next jump.
    pub(in crate::shim::machine) async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                Err(Errno::CANCELED) => return Ok(()),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) | Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd, time::Duration};

    use super::*;

    #[tokio::test]
    async fn timer_is_cancelled_by_clock_settings_and_does_not_expire() {
        let jumps = ClockJumps::watch().unwrap();

        let wait = tokio::time::timeout(Duration::from_millis(50), jumps.next());
        assert!(wait.await.is_err());

        // A test must not set the host's clock, but the kernel shows how the timer is armed (proc_pid_fdinfo(5)).
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", jumps.0.get_ref().as_raw_fd())).unwrap();
        assert!(info.contains(&format!("clockid: {}\n", libc::CLOCK_REALTIME)), "{info}");
        let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        assert!(info.contains(&format!("settime flags: 0{flags:o}\n")), "{info}");
    }
}
