//! Keeps a guest's clock with the host's: from the start, since a kernel counts its first moments by
//! ticks and misses some, and where the host's jumps, because it was set or the host was suspended. In
//! between KVM's clock runs as the host's does.

use std::{
    io,
    os::fd::OwnedFd,
    time::{SystemTime, UNIX_EPOCH},
};

use nutshell_protocol::Request;
use rustix::{
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{Agent, AgentError};

/// Tells of each jump of the host's clock (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`).
#[derive(Debug)]
pub(super) struct Jumps(AsyncFd<OwnedFd>);

impl Jumps {
    /// From now on. Needs the runtime.
    pub(super) fn watch() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // It expires in a time that no clock shows: only a jump of the clock ends the wait.
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
        // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as it is owned, and
        // `AsyncFd` owns it from here on.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?;
        Ok(Self(timer))
    }

    async fn next(&self) -> io::Result<()> {
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

    /// Has the guest's clock follow until the agent is gone.
    pub(super) async fn follow(self, agent: &Agent) -> io::Result<()> {
        agent.ready().await;
        loop {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            match agent.run(Request::SetClock { nanoseconds }).await {
                Ok(()) => log::debug!("the guest's clock was set to the host's"),
                Err(AgentError::Gone) => return Ok(()),
                Err(error) => log::warn!("set the guest's clock to the host's: {error}"),
            }
            self.next().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_jump_is_seen_while_there_is_none() {
        let jumps = Jumps::watch().unwrap();
        let wait = tokio::time::timeout(std::time::Duration::from_millis(50), jumps.next());
        assert!(wait.await.is_err());
    }
}
