//! The deadline of a boot, which follows the guest's progress. A host may be so slow that a boot takes minutes: it is
//! under load, or is an emulated machine. A guest that hangs must still be ended soon.

use std::{collections::HashMap, fs, future::Future, time::Duration};

use tokio::time::Instant;

/// A boot ends after this multiple of its limit even if the guest makes progress all the time.
pub(super) const MAX_EXTENSION_FACTOR: u32 = 30;

/// How often the guest's progress is checked within the limit.
const CHECKS_PER_LIMIT: u32 = 8;

/// What grows while a guest boots, and stays the same when it hangs. Both values have upper bounds, and only growth
/// counts, so a guest cannot make progress without end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct BootProgress {
    /// The resident memory of the vmm process, in pages: it grows when the guest uses memory for the first time.
    pub(super) resident_pages: u64,
    /// See [`Notice::Progress`](crate::control::Notice::Progress).
    pub(super) io_addresses: u64,
}

impl BootProgress {
    /// The larger of each value. A guest may free memory again, and a vmm that does not answer has no count.
    fn max(self, other: Self) -> Self {
        Self {
            resident_pages: self.resident_pages.max(other.resident_pages),
            io_addresses: self.io_addresses.max(other.io_addresses),
        }
    }
}

/// Why a boot has taken too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BootStall {
    #[error("it made no progress for {} s", .0.as_secs_f32())]
    NoProgress(Duration),
    #[error("it takes longer than {} s", .0.as_secs_f32())]
    TooLong(Duration),
}

/// How long each thread of a process was runnable without running, by thread id.
pub(super) type RunQueueWaits = HashMap<u32, Duration>;

/// Waits until a guest has made no progress for `limit`, in which the time that its vmm waited for a CPU does not
/// count, or until the boot has taken [`MAX_EXTENSION_FACTOR`] times `limit`.
pub(super) async fn stalled<F: Future<Output = BootProgress>>(
    limit: Duration,
    progress: impl Fn() -> F,
    run_queue_waits: impl Fn() -> RunQueueWaits,
) -> BootStall {
    let start = Instant::now();
    let interval = limit / CHECKS_PER_LIMIT;
    // The first check counts as progress: it is compared with zero.
    let (mut reached, mut changed, mut waits_then) = (BootProgress::default(), start, RunQueueWaits::new());
    loop {
        tokio::time::sleep(interval).await;
        let (now, current, waits) = (Instant::now(), progress().await, run_queue_waits());
        if now - start >= limit * MAX_EXTENSION_FACTOR {
            return BootStall::TooLong(limit * MAX_EXTENSION_FACTOR);
        }
        let best = reached.max(current);
        if best != reached {
            (reached, changed, waits_then) = (best, now, waits);
        } else if (now - changed).saturating_sub(longest_wait(&waits_then, &waits)) >= limit {
            return BootStall::NoProgress(limit);
        }
    }
}

/// How long the thread that waited longest has waited between two readings. Not the sum over threads: a guest with many
/// vCPUs would extend its deadline by it even if each of them runs most of the time.
fn longest_wait(before: &RunQueueWaits, after: &RunQueueWaits) -> Duration {
    let waited = |(thread, wait): (&u32, &Duration)| {
        let before = before.get(thread).copied().unwrap_or_default();
        wait.saturating_sub(before)
    };
    after.iter().map(waited).max().unwrap_or_default()
}

/// The run queue waits of the threads of a process: the second field of each thread's `schedstat` (kernel,
/// `Documentation/scheduler/sched-stats.rst`). Empty if the process or the file does not exist.
pub(super) fn run_queue_waits(pid: u32) -> RunQueueWaits {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return RunQueueWaits::new();
    };
    let wait = |thread: fs::DirEntry| {
        let fields = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let nanoseconds = fields.split_ascii_whitespace().nth(1)?.parse().ok()?;
        Some((
            thread.file_name().to_str()?.parse().ok()?,
            Duration::from_nanos(nanoseconds),
        ))
    };
    threads.filter_map(|thread| wait(thread.ok()?)).collect()
}

/// The resident memory of a process in pages, 0 if it does not exist (proc(5), `statm`).
pub(super) fn resident_pages(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let resident = statm.split_ascii_whitespace().nth(1);
    resident.and_then(|pages| pages.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{
        future::ready,
        process::{Child, Command},
        thread,
    };

    use nix::{
        sched::{CpuSet, sched_getaffinity, sched_setaffinity},
        unistd::Pid,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(8);

    fn pages(resident_pages: u64) -> BootProgress {
        BootProgress {
            resident_pages,
            io_addresses: 0,
        }
    }

    fn seconds(start: Instant) -> u64 {
        start.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_hangs_from_the_start_stalls_after_the_first_check_and_the_limit() {
        let start = Instant::now();
        let stall = stalled(LIMIT, || ready(pages(3)), RunQueueWaits::new).await;
        assert_eq!((stall, seconds(start)), (BootStall::NoProgress(LIMIT), 9));
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_makes_progress_slowly_has_the_limit_again_after_each_step() {
        let start = Instant::now();
        // One new page every 7 seconds for a minute.
        let progress = || ready(pages(seconds(start).min(60) / 7));
        let stall = stalled(LIMIT, progress, RunQueueWaits::new).await;
        assert_eq!(stall, BootStall::NoProgress(LIMIT));
        assert!((64..=70).contains(&seconds(start)), "{}", seconds(start));
    }

    #[tokio::test(start_paused = true)]
    async fn new_io_addresses_are_progress() {
        let start = Instant::now();
        let progress = || {
            ready(BootProgress {
                resident_pages: 3,
                io_addresses: seconds(start).min(20),
            })
        };
        stalled(LIMIT, progress, RunQueueWaits::new).await;
        assert_eq!(seconds(start), 28);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_that_is_freed_and_used_again_is_no_progress() {
        let start = Instant::now();
        let progress = || ready(pages(3 + seconds(start) % 2));
        stalled(LIMIT, progress, RunQueueWaits::new).await;
        assert!(seconds(start) <= 10, "{}", seconds(start));
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_makes_progress_without_end_is_ended_at_last() {
        let start = Instant::now();
        let stall = stalled(LIMIT, || ready(pages(seconds(start))), RunQueueWaits::new).await;
        let max = LIMIT * MAX_EXTENSION_FACTOR;
        assert_eq!((stall, seconds(start)), (BootStall::TooLong(max), max.as_secs()));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_a_thread_waits_for_a_cpu_does_not_count() {
        let start = Instant::now();
        // Half of the time.
        let waits = || RunQueueWaits::from([(1, start.elapsed() / 2)]);
        stalled(LIMIT, || ready(pages(3)), waits).await;
        assert_eq!(seconds(start), 17);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_of_many_threads_are_not_added_up() {
        let start = Instant::now();
        // Eight threads that wait an eighth of the time each.
        let waits = || (0..8).map(|thread| (thread, start.elapsed() / 8)).collect();
        stalled(LIMIT, || ready(pages(3)), waits).await;
        assert_eq!(seconds(start), 11);
    }

    #[test]
    fn resident_memory_of_this_process_is_found() {
        assert!(resident_pages(std::process::id()) > 100);
        assert_eq!(resident_pages(u32::MAX), 0);
    }

    /// A process that never sleeps. It is killed on drop.
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
        let none = RunQueueWaits::new();
        while busy
            .iter()
            .any(|busy| longest_wait(&none, &run_queue_waits(busy.pid())) < Duration::from_millis(20))
        {
            assert!(std::time::Instant::now() < deadline, "no wait was measured");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn unknown_process_has_no_run_queue_waits() {
        assert_eq!(run_queue_waits(u32::MAX), RunQueueWaits::new());
    }
}
