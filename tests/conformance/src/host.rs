//! Inspection of the host: processes, mounts, control groups, and the resources of a process.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

/// The folder for the files of the tests: `conformance` in the directory for temporary files.
pub(crate) fn work_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = env::temp_dir().join("conformance");
        fs::create_dir_all(&folder).unwrap();
        folder
    })
}

/// A process of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// The name, at most 15 bytes (`/proc/<pid>/comm`).
    pub name: String,
    /// The pid in the namespace of the test.
    pub pid: u32,
}

/// The resources of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Number of open descriptors.
    pub descriptors: usize,
    /// With the main thread.
    pub threads: usize,
    /// Private dirty memory in KiB.
    pub private: u64,
}

/// The processes in a control group and in its descendants, sorted. Zombies are not included.
pub fn processes_in(group: &Path) -> Vec<Process> {
    let mut found: Vec<_> = cgroups_at(group)
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

/// The control group `group` and its descendants, parents first.
pub fn cgroups_at(group: &Path) -> Vec<PathBuf> {
    let mut found = vec![group.to_owned()];
    let below = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.extend(cgroups_at(&entry.path()));
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

/// Reads the current resources of a process.
///
/// # Panics
///
/// If the process does not exist.
pub fn read_usage(pid: u32) -> Usage {
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

/// Sends a signal. It is not an error if the process has ended.
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
        // Older kernels return EINVAL if the process has ended but its pid is still the id of a session.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => true,
        Err(error) => panic!("pidfd_open of process {pid:?}: {error}"),
    }
}

/// Whether the process exists and has not ended.
pub fn is_alive(pid: u32) -> bool {
    pid > 0 && !ends_within(pid, Duration::ZERO)
}

/// Calls `check` every 20 ms until it succeeds. For conditions that the kernel sends no notification of.
///
/// # Errors
///
/// The last error of `check`, after `limit`.
pub fn eventually<T>(limit: Duration, mut check: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let start = std::time::Instant::now();
    loop {
        match check() {
            Err(_) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

/// Kills all processes of a control group, and removes it and its descendants.
///
/// # Errors
///
/// If the kernel still refuses to remove one after 10 s.
pub fn remove_cgroup(group: &Path) -> Result<(), String> {
    let _ = fs::write(group.join("cgroup.kill"), "1");
    eventually(Duration::from_secs(10), || {
        cgroups_at(group).iter().rev().try_for_each(|folder| {
            fs::remove_dir(folder).map_err(|error| format!("remove control group {}: {error}", folder.display()))
        })
    })
}
