//! Deadlines for a machine, in time in which it could have run. Where many machines start at once,
//! each waits for a CPU most of the time: that time is the host's fault and not counted.

use std::{fs, time::Duration};

use tokio::time::Instant;

/// However long a machine had to wait for a CPU, no deadline is extended beyond this multiple: some
/// minutes for a boot, in which even twenty machines on a busy laptop come up.
const MAX_EXTENSION_FACTOR: u32 = 30;

/// A deadline that moves.
#[derive(Debug)]
pub(super) struct RunTimeDeadline<W = fn(u32) -> Duration> {
    limit: Duration,
    start: Instant,
    pid: u32,
    /// How long the process had waited for a CPU when the deadline was set.
    waited: Duration,
    waited_now: W,
}

impl RunTimeDeadline {
    /// `limit` from now, for the process `pid`.
    pub(super) fn with(pid: u32, limit: Duration) -> Self {
        Self::measured(pid, limit, run_queue_wait)
    }
}

impl<W: Fn(u32) -> Duration> RunTimeDeadline<W> {
    fn measured(pid: u32, limit: Duration, waited_now: W) -> Self {
        Self {
            limit,
            start: Instant::now(),
            pid,
            waited: waited_now(pid),
            waited_now,
        }
    }

    /// Waits until the process had its time. Returns how long that took.
    pub(super) async fn exhausted(&self) -> Duration {
        let mut wait = self.limit;
        loop {
            tokio::time::sleep(wait).await;
            let elapsed = self.start.elapsed();
            let starved = (self.waited_now)(self.pid).saturating_sub(self.waited);
            let ran = elapsed.saturating_sub(starved);
            // Not less than a tenth: a process that got nearly all of its time is not asked often.
            wait = self.limit.saturating_sub(ran).max(self.limit / 10);
            if ran >= self.limit || elapsed >= self.limit * MAX_EXTENSION_FACTOR {
                return elapsed;
            }
        }
    }
}

/// How long the threads of a process together were runnable and did not run: the second field of
/// each `schedstat` (kernel, `Documentation/scheduler/sched-stats.rst`). Zero if that is not known.
fn run_queue_wait(pid: u32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    threads
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("schedstat")).ok())
        .filter_map(|fields| fields.split_ascii_whitespace().nth(1)?.parse().ok())
        .map(Duration::from_nanos)
        .sum()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn process_that_could_run_has_its_limit_and_no_more() {
        let deadline = RunTimeDeadline::measured(0, LIMIT, |_| Duration::from_secs(3));
        assert_eq!(deadline.exhausted().await.as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_the_run_queue_is_given_back() {
        let start = Instant::now();
        // Starved half of the time for the first 20 seconds.
        let waited = move |_| start.elapsed().min(Duration::from_secs(20)) / 2;
        let elapsed = RunTimeDeadline::measured(0, LIMIT, waited).exhausted().await;
        assert!((20..=21).contains(&elapsed.as_secs()), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_even_for_a_process_that_never_runs() {
        let seconds = AtomicU64::new(0);
        let waited = |_| Duration::from_secs(seconds.fetch_add(1000, Ordering::Relaxed));
        let elapsed = RunTimeDeadline::measured(0, LIMIT, waited).exhausted().await;
        let most = u64::from(MAX_EXTENSION_FACTOR) * LIMIT.as_secs();
        assert!((most..=most + 1).contains(&elapsed.as_secs()), "{elapsed:?}");
    }

    #[test]
    fn run_queue_wait_of_nobody_is_zero() {
        assert_eq!(run_queue_wait(u32::MAX), Duration::ZERO);
    }
}
