//! The cgroup (v2) of a container: its processes, limits, device rules, freezer and counters.
//!
//! The event loop and its jobs call this, and `machine` delegates the controllers at boot. The limits in a
//! container's spec are applied by libcontainer when it creates the container, and not by this module.

pub(crate) mod devices;
pub(crate) mod freeze;
pub(crate) mod limits;
pub(crate) mod stats;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Pid;

/// The mount point of the cgroup hierarchy.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// The maximum number of cgroups in which [`Cgroup::processes`] looks. A systemd in a container has a few hundred.
const MAX_VISITED_CGROUPS: usize = 2048;

/// The maximum number of processes that [`Cgroup::processes`] returns.
const MAX_LISTED_PROCESSES: usize = 65_536;

/// The processes of a cgroup and its descendants.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    pub(crate) pids: Vec<Pid>,
    /// There may be more processes: a limit was reached.
    pub(crate) is_truncated: bool,
}

/// The path of a cgroup below the root. The cgroup need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Returns the cgroup of a container.
    ///
    /// All containers' cgroups are direct children of the root, regardless of the path in their specs. The parents in
    /// such a path belong to the host (a pod's slice). They have no limits here, and each would slow down the creation
    /// of every container. The prefix prevents a clash between an id such as `cpu.max` and a file of the root.
    pub(crate) fn of_container(container: &str) -> Self {
        Self::at(&format!("/container-{container}"))
    }

    /// Returns the cgroup at `path` below the root. `path` begins with `/`.
    fn at(path: &str) -> Self {
        Self {
            path: Path::new(ROOT).join(path.trim_start_matches('/')),
        }
    }

    /// Returns the path below the root, in the form of a spec's `linux.cgroupsPath`.
    pub(crate) fn spec_path(&self) -> PathBuf {
        Path::new("/").join(self.path.strip_prefix(ROOT).unwrap_or(&self.path))
    }

    /// Returns the path of a file of the cgroup.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the directory of the cgroup.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.path)
    }

    /// Returns the processes of the cgroup and its descendants, breadth first. The walk has limits, because this runs
    /// in the event loop and a container may create any number of cgroups.
    pub(crate) fn processes(&self) -> Processes {
        let mut found = Processes::default();
        let mut directories = VecDeque::from([self.path.clone()]);
        let mut visited = 0;
        while let Some(directory) = directories.pop_front() {
            // The cgroup may be removed meanwhile.
            if let Ok(list) = File::open(directory.join("cgroup.procs")) {
                let pids = BufReader::new(list).lines().map_while(Result::ok);
                let mut pids = pids.filter_map(|line| Pid::from_raw(line.parse().ok()?));
                found
                    .pids
                    .extend(pids.by_ref().take(MAX_LISTED_PROCESSES - found.pids.len()));
                found.is_truncated |= pids.next().is_some();
            }
            visited += 1;
            let left = MAX_VISITED_CGROUPS - visited - directories.len();
            let mut below = child_directories(&directory);
            directories.extend(below.by_ref().take(left));
            found.is_truncated |= below.next().is_some();
        }
        found
    }

    /// Kills the processes of the cgroup and its descendants.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.file("cgroup.kill"), "1")
    }

    /// Removes the cgroup and its descendants. They must have no processes.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let mut directories = vec![self.path.clone()];
        let mut at = 0;
        while at < directories.len() {
            let below: Vec<_> = child_directories(&directories[at]).collect();
            directories.extend(below);
            at += 1;
        }
        for directory in directories.iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn of_process(pid: Pid) -> io::Result<Cgroup> {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero()))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(Cgroup::at)
        .ok_or_else(|| io::Error::other("the process has no cgroup v2"))
}

/// The controllers that containers use.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Enables those [`CONTROLLERS`] that the kernel supports, for the cgroups of containers.
pub(crate) fn delegate_controllers() -> io::Result<()> {
    let root = Path::new(ROOT);
    let available = fs::read_to_string(root.join("cgroup.controllers"))?;
    let wanted: Vec<String> = available
        .split_whitespace()
        .filter(|controller| CONTROLLERS.contains(controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    fs::write(root.join("cgroup.subtree_control"), wanted.join(" "))
}

/// Waits until `key` in `events`, an open `cgroup.events`, has `value`. Returns `false` after `timeout`.
pub(crate) fn wait_for_event(events: &File, key: &str, value: u64, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let text = read_from_start(events)?;
        let found = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        if found == Some(value) {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&timeout)))?;
    }
}

/// Reads a cgroup file of at most 512 bytes from its start. This also resets its readiness for poll(2).
fn read_from_start(file: &File) -> io::Result<String> {
    let mut bytes = [0; 512];
    let read = file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..read]).into_owned())
}

fn child_directories(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// Watches a cgroup's `memory.events` for out-of-memory kills.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    file: File,
    /// The source number of its events.
    pub(crate) source_number: u32,
    /// The number of kills at the last check.
    seen_kills: u64,
}

impl MemoryWatch {
    /// Starts to watch a new cgroup, in which no process has been killed yet.
    pub(crate) fn open(cgroup: &Cgroup, source_number: u32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(cgroup.file("memory.events"))?,
            source_number,
            seen_kills: 0,
        })
    }

    /// Whether the out-of-memory killer has killed processes since the last call.
    pub(crate) fn has_new_kills(&mut self) -> bool {
        let kills = oom_kills(&read_from_start(&self.file).unwrap_or_default());
        let has_new = kills > self.seen_kills;
        self.seen_kills = self.seen_kills.max(kills);
        has_new
    }
}

impl AsFd for MemoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_of_a_container_does_not_clash_with_files_of_the_root() {
        let cgroup = Cgroup::of_container("cpu.max");
        assert_eq!(cgroup.path(), Path::new("/sys/fs/cgroup/container-cpu.max"));
        assert_eq!(cgroup.spec_path(), Path::new("/container-cpu.max"));
    }

    /// A directory that looks like a cgroup with these processes.
    fn fake_cgroup(path: &Path, pids: std::ops::Range<usize>) {
        fs::create_dir_all(path).unwrap();
        let lines: String = pids.map(|pid| format!("{pid}\n")).collect();
        fs::write(path.join("cgroup.procs"), lines).unwrap();
    }

    #[test]
    fn processes_of_descendants_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for (path, pid) in [("", 1), ("a", 2), ("b", 3), ("a/c", 4)] {
            fake_cgroup(&folder.path().join(path), pid..pid + 1);
        }
        let found = Cgroup {
            path: folder.path().to_owned(),
        }
        .processes();
        let mut pids: Vec<_> = found.pids.iter().map(|pid| pid.as_raw_nonzero().get()).collect();
        pids.sort_unstable();
        assert_eq!((pids, found.is_truncated), (vec![1, 2, 3, 4], false));
    }

    #[test]
    fn search_for_processes_has_limits() {
        let many = tempfile::tempdir().unwrap();
        for number in 1..=MAX_VISITED_CGROUPS + 10 {
            fake_cgroup(&many.path().join(number.to_string()), number..number + 1);
        }
        let large = tempfile::tempdir().unwrap();
        fake_cgroup(large.path(), 1..MAX_LISTED_PROCESSES + 10);
        fake_cgroup(&large.path().join("below"), 7..8);
        // The root of the first one has no processes.
        for (folder, expected) in [(many, MAX_VISITED_CGROUPS - 1), (large, MAX_LISTED_PROCESSES)] {
            let path = folder.path().to_owned();
            let found = Cgroup { path }.processes();
            assert_eq!((found.pids.len(), found.is_truncated), (expected, true));
        }
    }

    #[test]
    fn kills_are_read_from_memory_events() {
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }
}
