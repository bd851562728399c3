//! What is on the host: processes, mounts, control groups, and what a process uses.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

/// A process of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its name, at most 15 bytes (`/proc/<pid>/comm`).
    pub name: String,
    /// Its pid.
    pub pid: u32,
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Memory that it has written and nobody else maps, in KiB.
    pub private: u64,
}

/// The processes in a control group and those below it, sorted. Those that have ended and were not
/// waited for yet are in none.
pub fn processes_in(group: &Path) -> Vec<Process> {
    let mut found: Vec<_> = groups_at(group)
        .iter()
        .flat_map(|folder| {
            fs::read_to_string(folder.join("cgroup.procs"))
                .unwrap_or_default()
                .lines()
                .filter_map(|line| line.parse().ok())
                .collect::<Vec<u32>>()
        })
        .filter_map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Some(Process {
                name: name.trim().to_owned(),
                pid,
            })
        })
        .collect();
    found.sort();
    found
}

/// The control group `group` and all below it, parents first.
pub fn groups_at(group: &Path) -> Vec<PathBuf> {
    let mut found = vec![group.to_owned()];
    let below = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.extend(groups_at(&entry.path()));
    }
    found
}

/// The mount points of this mount namespace at or below `path`.
pub fn mounts_below(path: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(path))
        .map(str::to_owned)
        .collect()
}

/// What a process holds now.
pub fn usage(pid: u32) -> Usage {
    let count = |folder| fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count();
    let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let private = memory
        .lines()
        .filter(|line| line.starts_with("Private_Dirty"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Usage {
        descriptors: count("fd"),
        threads: count("task"),
        private,
    }
}

/// Sends a signal; nothing happens if the process has ended.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether the process has ended or ends within `limit`.
pub fn ends_within(pid: u32, limit: Duration) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return true;
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => {
            let limit = Timespec::try_from(limit).unwrap();
            poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap() == 1
        }
        // Older kernels say the second of a pid that is only a session's any more.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => true,
        Err(error) => panic!("pidfd_open: {error}"),
    }
}

/// Whether `/proc/<pid>` is a living process.
pub fn is_alive(pid: u32) -> bool {
    pid > 0 && !ends_within(pid, Duration::ZERO)
}

/// Waits until `done` says so, asking again and again: for what the kernel announces to nobody.
///
/// # Errors
///
/// What `done` said last, after `limit`.
pub fn eventually<T>(limit: Duration, mut done: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let start = std::time::Instant::now();
    loop {
        match done() {
            Err(_) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

/// Kills all processes of a control group and removes it with all below it.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn remove_group(group: &Path) -> Result<(), String> {
    let _ = fs::write(group.join("cgroup.kill"), "1");
    eventually(Duration::from_secs(10), || {
        groups_at(group)
            .iter()
            .rev()
            .try_for_each(fs::remove_dir)
            .map_err(|error| format!("{}: {error}", group.display()))
    })
}
