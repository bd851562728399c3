//! Deadlines that count only the time in which the vmm process could run. When many machines start at once, each waits
//! for a CPU most of the time, because of the host's load and not because of a fault in the guest.

use std::{fs, time::Duration};

use tokio::time::Instant;

/// A deadline expires after this multiple of its limit, however long the process has waited for a CPU: some minutes for
/// a boot, which is enough if twenty machines start at once on a laptop under load.
const MAX_EXTENSION_FACTOR: u32 = 30;

/// A deadline for a process that is extended by the time in which its threads waited for a CPU.
#[derive(Debug)]
pub(super) struct RunTimeDeadline<W = fn(u32) -> Duration> {
    limit: Duration,
    start: Instant,
    pid: u32,
    /// The process's run queue wait at `start`.
    wait_at_start: Duration,
    /// Returns the total run queue wait of a process.
    run_queue_wait: W,
}

impl RunTimeDeadline {
    /// A deadline for the process `pid`, `limit` of run time from now.
    pub(super) fn new(pid: u32, limit: Duration) -> Self {
        Self::with_wait_source(pid, limit, run_queue_wait)
    }
}

impl<W: Fn(u32) -> Duration> RunTimeDeadline<W> {
    fn with_wait_source(pid: u32, limit: Duration, run_queue_wait: W) -> Self {
        Self {
            limit,
            start: Instant::now(),
            pid,
            wait_at_start: run_queue_wait(pid),
            run_queue_wait,
        }
    }

    /// Waits until the deadline has passed. Returns the time since it was set.
    pub(super) async fn expired(&self) -> Duration {
        let mut sleep = self.limit;
        loop {
            tokio::time::sleep(sleep).await;
            let elapsed = self.start.elapsed();
            let waited = (self.run_queue_wait)(self.pid).saturating_sub(self.wait_at_start);
            let ran = elapsed.saturating_sub(waited);
            if ran >= self.limit || elapsed >= self.limit * MAX_EXTENSION_FACTOR {
                return elapsed;
            }
            // At least a tenth of the limit: there is no need to poll often near the end.
            sleep = self.limit.saturating_sub(ran).max(self.limit / 10);
        }
    }
}

/// How long the threads of a process were runnable without running, in total: the second field of each thread's
/// `schedstat` (kernel, `Documentation/scheduler/sched-stats.rst`). Zero if the process or the file does not exist.
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
    use std::{
        process::{Child, Command},
        sync::atomic::{AtomicU64, Ordering},
        thread,
    };

    use nix::{
        sched::{CpuSet, sched_getaffinity, sched_setaffinity},
        unistd::Pid,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn deadline_without_run_queue_wait_is_exactly_the_limit() {
        let deadline = RunTimeDeadline::with_wait_source(0, LIMIT, |_| Duration::from_secs(3));
        assert_eq!(deadline.expired().await.as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn run_queue_wait_extends_the_deadline() {
        let start = Instant::now();
        // Waits half of the time for the first 20 seconds.
        let waited = move |_| start.elapsed().min(Duration::from_secs(20)) / 2;
        let elapsed = RunTimeDeadline::with_wait_source(0, LIMIT, waited).expired().await;
        assert!((20..=21).contains(&elapsed.as_secs()), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_expires_even_for_a_process_that_never_runs() {
        let seconds = AtomicU64::new(0);
        let waited = |_| Duration::from_secs(seconds.fetch_add(1000, Ordering::Relaxed));
        let elapsed = RunTimeDeadline::with_wait_source(0, LIMIT, waited).expired().await;
        let max = u64::from(MAX_EXTENSION_FACTOR) * LIMIT.as_secs();
        assert!((max..=max + 1).contains(&elapsed.as_secs()), "{elapsed:?}");
    }

    /// A process that never sleeps. Dropped, it is killed.
    struct BusyLoop(Child);

    impl BusyLoop {
        fn spawn_on(cpu: usize) -> Self {
            let child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
            let busy = Self(child);
            let mut cpus = CpuSet::new();
            cpus.set(cpu).unwrap();
            sched_setaffinity(Pid::from_raw(busy.pid().cast_signed()), &cpus).unwrap();
            busy
        }

        fn pid(&self) -> u32 {
            self.0.id()
        }
    }

    impl Drop for BusyLoop {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn run_queue_wait_grows_while_another_process_has_the_cpu() {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpu = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap()).unwrap();
        let busy = [BusyLoop::spawn_on(cpu), BusyLoop::spawn_on(cpu)];

        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while busy
            .iter()
            .any(|busy| run_queue_wait(busy.pid()) < Duration::from_millis(20))
        {
            assert!(std::time::Instant::now() < deadline, "no wait was measured");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn run_queue_wait_of_an_unknown_process_is_zero() {
        assert_eq!(run_queue_wait(u32::MAX), Duration::ZERO);
    }
}
