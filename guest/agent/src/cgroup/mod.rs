//! The cgroup (v2) of a container: its processes, limits, device rules, freezer and counters.
//!
//! The event loop and its jobs call this, and `machine` delegates the controllers at boot. The limits in a
//! container's spec are applied by libcontainer when it creates the container, and not by this module.

pub(crate) mod devices;
pub(crate) mod freeze;
pub(crate) mod limits;
pub(crate) mod stats;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Pid;

/// The mount point of the cgroup hierarchy.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

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

    /// Returns the processes of the cgroup and its descendants.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            // The cgroup may be removed meanwhile.
            if let Ok(list) = fs::read_to_string(directory.join("cgroup.procs")) {
                found.extend(list.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)));
            }
            directories.extend(child_directories(&directory));
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
            let below = child_directories(&directories[at]);
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

fn child_directories(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
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

    #[test]
    fn kills_are_read_from_memory_events() {
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }
}
