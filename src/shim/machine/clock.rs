//! Keeps the guest's clock equal to the host's. It is set once at the start, because a booting kernel counts its first
//! moments by timer ticks and misses some, and again after each jump of the host's clock: when it was set, or when the
//! host was suspended. In between KVM's clock runs at the host's rate.

use std::{
    future::Future,
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

use super::agent::{Agent, AgentError};

/// Reports jumps of the host's clock: a timer that the kernel cancels when the clock is set (timerfd_create(2),
/// `TFD_TIMER_CANCEL_ON_SET`).
#[derive(Debug)]
pub(super) struct ClockJumps(AsyncFd<OwnedFd>);

impl ClockJumps {
    /// Watches from now on. Needs the Tokio runtime.
    pub(super) fn watch() -> io::Result<Self> {
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
    pub(super) async fn next(&self) -> io::Result<()> {
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

/// Sets the guest's clock as soon as the agent is ready, and after each completion of `next_jump`. Returns when the
/// agent is gone, or with the error of `next_jump`.
pub(super) async fn follow_host_clock<F>(agent: &Agent, next_jump: impl Fn() -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>>,
{
    agent.ready().await;
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        match agent.run(Request::SetClock { nanoseconds }).await {
            Ok(()) => log::debug!("the guest's clock was set to the host's"),
            Err(AgentError::Gone) => return Ok(()),
            Err(error) => log::warn!("cannot set the guest's clock to the host's: {error}"),
        }
        next_jump().await?;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd, time::Duration};

    use nutshell_protocol::{FromAgent, Ready, Reply, Response, ToAgent};
    use tokio::sync::{Mutex, mpsc};

    use super::super::agent::tests::connect;
    use super::*;

    fn host_clock() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::try_from(now.as_nanos()).unwrap()
    }

    #[tokio::test]
    async fn guest_clock_is_set_at_start_and_after_each_jump_only() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        peer.send(&FromAgent::Ready(Ready {
            version: "1".to_owned(),
            kernel: "6.12".to_owned(),
        }));
        let (report, mut settings) = mpsc::unbounded_channel();
        let answering = tokio::task::spawn_blocking(move || {
            for _ in 0..2 {
                let ToAgent { id, request } = peer.receive();
                let Request::SetClock { nanoseconds } = request else {
                    panic!("{request:?}");
                };
                let result = Ok(Response::Done);
                peer.send(&FromAgent::Reply(Reply { id, result }));
                report.send(nanoseconds).unwrap();
            }
            // Held open, so that the agent is not gone.
            peer
        });
        let (jump, jumps) = mpsc::unbounded_channel();
        let jumps = Mutex::new(jumps);
        let next_jump = || async { jumps.lock().await.recv().await.ok_or(io::ErrorKind::BrokenPipe.into()) };
        let start = host_clock();

        let test = async {
            let first = settings.recv().await.unwrap();
            let early = tokio::time::timeout(Duration::from_millis(50), settings.recv()).await;
            assert!(early.is_err(), "set without a jump");
            let between = host_clock();
            jump.send(()).unwrap();
            let second = settings.recv().await.unwrap();
            assert!(start <= first && first <= between, "{start} {first} {between}");
            assert!(between <= second && second <= host_clock(), "{between} {second}");
        };
        tokio::select! {
            () = test => {}
            result = follow_host_clock(&agent, next_jump) => panic!("{result:?}"),
        }
        drop(answering.await.unwrap());
    }

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
