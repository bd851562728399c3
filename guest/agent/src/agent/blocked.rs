//! Finds the threads that keep a killed process from ending, because they wait in the kernel.

use std::fs;
use std::path::Path;

use nutshell_protocol::{BlockedThread, MAX_BLOCKED_THREADS};
use rustix::process::Pid;

use crate::container::Container;
use crate::sys;

/// The maximum number of threads to look at, because this runs in the event loop.
const MAX_THREADS: usize = 4096;

/// The flag of a thread that is ending (kernel, `PF_EXITING` in include/linux/sched.h).
const EXITING: u32 = 4;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activity {
    /// It has a CPU or waits for one.
    Running,
    /// No signal ends its wait.
    Uninterruptible,
    /// It is ending, and waits. No signal reaches it any more: one that closes a file of a FUSE file system waits like
    /// this for the answer, and the first process of a pid namespace for the other processes.
    Exiting,
    Other,
}

/// Returns the threads that keep an exec, or the first process if `exec` is `None`, from ending. Empty if a thread
/// still runs. Does not block: no file that it reads needs a lock that a blocked thread can hold.
pub(crate) fn find(container: &Container, exec: Option<&str>) -> Vec<BlockedThread> {
    if let Some(exec) = exec {
        let pid = container.execs.get(exec).and_then(|exec| exec.pid);
        return select_blocked(&read_threads(pid.as_slice()));
    }
    let mut threads = read_threads(container.init.pid.as_slice());
    let is_blocked = threads
        .iter()
        .any(|(activity, _)| *activity == Activity::Uninterruptible);
    if !is_blocked {
        let init = container.init.pid;
        let others = container.cgroup.processes().pids;
        let others: Vec<_> = others.into_iter().filter(|pid| Some(*pid) != init).collect();
        threads.extend(read_threads(&others));
    }
    select_blocked(&threads)
}

/// Returns the blocked threads, none if a thread is running.
fn select_blocked(threads: &[(Activity, BlockedThread)]) -> Vec<BlockedThread> {
    if threads.iter().any(|(activity, _)| *activity == Activity::Running) {
        return Vec::new();
    }
    let is_blocked = |activity| matches!(activity, Activity::Uninterruptible | Activity::Exiting);
    let blocked = threads.iter().filter(|(activity, _)| is_blocked(*activity));
    blocked
        .take(MAX_BLOCKED_THREADS)
        .map(|(_, thread)| thread.clone())
        .collect()
}

/// Reads the threads of these processes, at most [`MAX_THREADS`].
fn read_threads(pids: &[Pid]) -> Vec<(Activity, BlockedThread)> {
    let threads = pids.iter().flat_map(|pid| {
        // A process or thread that has ended has no files.
        let entries = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
        let entries = entries.into_iter().flatten().flatten();
        entries.filter_map(|entry| read_thread(sys::raw_pid(*pid), &entry.path()))
    });
    threads.take(MAX_THREADS).collect()
}

/// Reads the state of a thread from its directory in /proc.
fn read_thread(pid: u32, directory: &Path) -> Option<(Activity, BlockedThread)> {
    let read = |file| Some(String::from_utf8_lossy(&fs::read(directory.join(file)).ok()?).into_owned());
    let thread = directory.file_name()?.to_str()?.parse().ok()?;
    let activity = parse_stat(&read("stat")?)?;
    let (name, switches) = parse_status(&read("status")?)?;
    let thread = BlockedThread {
        pid,
        thread,
        name,
        switches,
    };
    Some((activity, thread))
}

/// Returns the activity of a thread with this file `stat` (proc(5)). The name in it may contain anything.
fn parse_stat(stat: &str) -> Option<Activity> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let flags: u32 = fields.nth(5)?.parse().ok()?;
    Some(match state {
        "R" => Activity::Running,
        "D" => Activity::Uninterruptible,
        "S" if flags & EXITING != 0 => Activity::Exiting,
        _ => Activity::Other,
    })
}

/// Returns the name and the number of context switches in the file `status` of a thread (proc(5)).
fn parse_status(status: &str) -> Option<(String, u64)> {
    let value = |key: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| Some(line.strip_prefix(key)?.trim()))
    };
    let switches = |key: &str| value(key)?.parse::<u64>().ok();
    let count = switches("voluntary_ctxt_switches:")?.saturating_add(switches("nonvoluntary_ctxt_switches:")?);
    Some((value("Name:")?.to_owned(), count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activity_is_read_from_state_and_flags() {
        for (stat, expected) in [
            ("7 (dd) R 1 7 7 0 -1 4194304 100", Activity::Running),
            ("7 (dd) D 1 7 7 0 -1 4194304 100", Activity::Uninterruptible),
            ("7 (a) R (b)) D 1 7 7 0 -1 4194308 100", Activity::Uninterruptible),
            ("7 (dd) S 1 7 7 0 -1 4194304 100", Activity::Other),
            ("7 (dd) S 1 7 7 0 -1 4194308 100", Activity::Exiting),
            ("7 (dd) Z 1 7 7 0 -1 4194308 100", Activity::Other),
        ] {
            assert_eq!(parse_stat(stat), Some(expected), "{stat}");
        }
        assert_eq!(parse_stat("7 (dd) D"), None);
    }

    #[test]
    fn name_and_switches_of_a_thread_are_read() {
        let status = "Name:\tdd\nState:\tD (disk sleep)\n\
                      voluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(parse_status(status), Some(("dd".to_owned(), 42)));
        assert_eq!(parse_status("Name:\tdd\n"), None);
    }

    #[test]
    fn no_thread_is_blocked_while_one_runs() {
        let thread = |activity| {
            let thread = BlockedThread {
                pid: 7,
                thread: 7,
                name: String::new(),
                switches: 0,
            };
            (activity, thread)
        };
        let count = |threads: &[Activity]| {
            let threads: Vec<_> = threads.iter().copied().map(thread).collect();
            select_blocked(&threads).len()
        };
        use Activity::{Exiting, Other, Running, Uninterruptible};
        assert_eq!(count(&[Uninterruptible, Exiting, Other]), 2);
        assert_eq!(count(&[Uninterruptible, Running]), 0);
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[Uninterruptible; 20]), MAX_BLOCKED_THREADS);
    }

    #[test]
    fn running_thread_is_found() {
        let this = rustix::process::getpid();
        let directory = format!("/proc/self/task/{}", rustix::thread::gettid().as_raw_nonzero());
        let (activity, thread) = read_thread(sys::raw_pid(this), Path::new(&directory)).unwrap();
        assert_eq!((activity, thread.pid), (Activity::Running, sys::raw_pid(this)));
    }
}
