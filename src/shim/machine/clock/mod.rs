//! Keeps the guest's clock equal to the host's.
//!
//! The guest's clock source has almost the rate of the host's raw clock. The host's clock has another rate, which a
//! time daemon changes. The kernel reports that the clock was set, but not that its rate changed. So
//! [`follow_host_clock`] reads the host's clocks regularly (`host`), computes what the guest's clock shows (`guest`),
//! and makes requests to the guest when the two deviate (`controller`). Only `machine` calls this.

mod controller;
mod guest;
mod host;
mod interval;
mod jumps;
#[cfg(test)]
mod simulation;

use std::{
    future::Future,
    io,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{time::ClockId, unistd::Pid};
use nutshell_protocol::{ClockReading, Request, Response};

pub(super) use self::jumps::ClockJumps;
use self::{
    controller::{ClockRequest, Controller, Step},
    host::HostTime,
    interval::IntervalTimer,
};
use super::agent::{Agent, AgentError};
use crate::control::RateLimit;

/// How long an answer may take before a warning is logged. The shim still waits for it, so that requests do not
/// accumulate in a guest that does not run.
const ANSWER_WARNING_DELAY: Duration = Duration::from_secs(10);

/// The minimum time between two logs of the same warning.
const WARNING_INTERVAL: Duration = Duration::from_secs(3600);

/// The kinds of warnings. Each has its own limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Warning {
    NoAnswer,
    Refused,
    Fails,
}

/// Sets the guest's clock as soon as the agent is ready and after each completion of `next_jump`, and steers it in
/// between. `is_busy` returns whether the guest has run much since the last call. Returns when the agent is gone, or
/// with the error of `next_jump` or of a timer.
pub(super) async fn follow_host_clock<F>(
    agent: &Agent,
    next_jump: impl Fn() -> F,
    mut is_busy: impl FnMut() -> bool,
) -> io::Result<()>
where
    F: Future<Output = io::Result<()>>,
{
    let mut controller = Controller::new(HostTime::read());
    let mut warnings = RateLimit::new(1, WARNING_INTERVAL);
    let timer = IntervalTimer::new()?;
    agent.ready().await;
    loop {
        match controller.next(HostTime::read(), is_busy()) {
            Step::Sleep(time) => tokio::select! {
                slept = timer.sleep(time) => slept?,
                jump = next_jump() => {
                    jump?;
                    controller.host_jumped();
                }
            },
            Step::Ask(request) => {
                let sent = HostTime::read();
                match ask(agent, request, &mut warnings).await {
                    Ok(reading) => controller.answered(request, sent, HostTime::read(), &reading),
                    Err(AgentError::Gone) => return Ok(()),
                    Err(error) => {
                        controller.refused(HostTime::read());
                        if warnings.admit(Warning::Refused, Instant::now()).is_some() {
                            log::warn!("cannot read or change the guest's clock: {error}");
                        }
                    }
                }
                log::debug!("guest's clock: {request:?}");
                if controller.is_failing() && warnings.admit(Warning::Fails, Instant::now()).is_some() {
                    log::warn!("the guest's clock does not follow the host's: something in the guest changes it");
                }
            }
        }
    }
}

/// Sends a request and waits for its answer.
async fn ask(
    agent: &Agent,
    request: ClockRequest,
    warnings: &mut RateLimit<Warning>,
) -> Result<ClockReading, AgentError> {
    let request = match request {
        ClockRequest::Read => Request::ReadClock,
        ClockRequest::Steer(steering) => Request::SteerClock(steering),
        ClockRequest::Set(rate) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            Request::SetClock { nanoseconds, rate }
        }
    };
    let answer = agent.ask(request, |response| match response {
        Response::Clock(reading) => Some(reading),
        _ => None,
    });
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        () = tokio::time::sleep(ANSWER_WARNING_DELAY) => {
            if warnings.admit(Warning::NoAnswer, Instant::now()).is_some() {
                log::warn!("the guest does not answer; its clock may be wrong until it does");
            }
            answer.await
        }
    }
}

/// Returns a function that tells whether the process has used a CPU for more than 1/200 of the time since the last call
/// of that function.
pub(super) fn is_busy(pid: u32) -> impl FnMut() -> bool {
    /// An idle guest uses less of the time: it wakes a few times per second, for some microseconds.
    const BUSY_DIVISOR: u32 = 200;
    let clock = i32::try_from(pid).ok().map(Pid::from_raw);
    let clock = clock.and_then(|pid| ClockId::pid_cpu_clock_id(pid).ok());
    let mut last = (Instant::now(), Duration::ZERO);
    move || {
        // A process that has ended is not busy.
        let used = clock.and_then(|clock| clock.now().ok()).map_or(last.1, Duration::from);
        let now = Instant::now();
        let is_busy = used.saturating_sub(last.1) * BUSY_DIVISOR > now - last.0;
        last = (now, used);
        is_busy
    }
}

#[cfg(test)]
mod tests {
    use nutshell_protocol::{FromAgent, Ready, Reply, ToAgent};
    use tokio::sync::{Mutex, mpsc};

    use super::super::agent::tests::{Peer, connect};
    use super::*;

    fn host_clock() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::try_from(now.as_nanos()).unwrap()
    }

    fn be_ready(peer: &mut Peer) {
        peer.send(&FromAgent::Ready(Ready {
            version: "1".to_owned(),
            kernel: "6.12".to_owned(),
        }));
    }

    #[tokio::test]
    async fn guest_clock_is_set_at_start_and_after_each_jump_only() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        be_ready(&mut peer);
        let (report, mut settings) = mpsc::unbounded_channel();
        let answering = tokio::task::spawn_blocking(move || {
            for _ in 0..2 {
                let ToAgent { id, request } = peer.receive();
                let Request::SetClock { nanoseconds, .. } = request else {
                    panic!("{request:?}");
                };
                let result = Ok(Response::Clock(ClockReading {
                    nanoseconds: i64::try_from(host_clock()).unwrap(),
                    lead: Some((0, 0)),
                }));
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
            result = follow_host_clock(&agent, next_jump, || false) => panic!("{result:?}"),
        }
        drop(answering.await.unwrap());
    }

    #[tokio::test]
    async fn guest_clock_that_is_late_is_steered() {
        let (stream, mut peer) = connect();
        let (agent, _end) = Agent::start(stream, |_| {}).unwrap();
        be_ready(&mut peer);
        let answering = tokio::task::spawn_blocking(move || {
            let mut answer = |lead| {
                let ToAgent { id, request } = peer.receive();
                let nanoseconds = i64::try_from(host_clock()).unwrap();
                let result = Ok(Response::Clock(ClockReading { nanoseconds, lead }));
                peer.send(&FromAgent::Reply(Reply { id, result }));
                request
            };
            answer(Some((-2_000_000, -1_999_000)));
            let request = answer(Some((-2_000_000, -1_999_000)));
            (peer, request)
        });
        let (_peer, request) = tokio::select! {
            answered = answering => answered.unwrap(),
            result = follow_host_clock(&agent, std::future::pending, || false) => panic!("{result:?}"),
        };
        let Request::SteerClock(steering) = request else {
            panic!("{request:?}");
        };
        let gain = i64::from(steering.temporary_rate) * i64::from(steering.temporary_milliseconds) / 1000;
        assert!((1_900_000..2_100_000).contains(&gain), "{steering:?}");
    }

    #[test]
    fn process_is_busy_while_it_computes() {
        let mut is_busy = is_busy(std::process::id());
        is_busy();
        let start = Instant::now();
        let mut sum = 0u64;
        while start.elapsed() < Duration::from_millis(20) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(is_busy());
        // No process has this pid: the kernel's limit is 2^22.
        assert!(!super::is_busy((1 << 22) + 1)());
    }
}
