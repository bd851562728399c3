//! The cgroup (v2) of a container: its processes, limits, device rules, freezer and counters.
//!
//! Jobs and the event loop call this; `machine` delegates the controllers. What libcontainer does with the
//! cgroup when it creates a container is not here.

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

/// Where the hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup below the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container.
    ///
    /// All lie side by side, whatever path a spec asks for: those above would be the host's (a pod's
    /// slice), which have no limits here, and each costs every container's creation. The prefix keeps
    /// an id such as `cpu.max` apart from the files of the root.
    pub(crate) fn of_container(container: &str) -> Self {
        Self::at(&format!("/container-{container}"))
    }

    /// The cgroup at `path`, which begins with `/`, below the root.
    fn at(path: &str) -> Self {
        Self {
            path: Path::new(ROOT).join(path.trim_start_matches('/')),
        }
    }

    /// Its path below the root, as specs have it.
    pub(crate) fn spec_path(&self) -> PathBuf {
        Path::new("/").join(self.path.strip_prefix(ROOT).unwrap_or(&self.path))
    }

    /// A file of the cgroup.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The cgroup's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the cgroup.
    pub(crate) fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.path)
    }

    /// Every process of the cgroup and those below it.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            // A cgroup may go away while it is looked at.
            if let Ok(list) = fs::read_to_string(folder.join("cgroup.procs")) {
                found.extend(list.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)));
            }
            folders.extend(subfolders(&folder));
        }
        found
    }

    /// Kills every process of the cgroup and those below it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.file("cgroup.kill"), "1")
    }

    /// Removes the cgroup and those below it; they must be empty.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let mut folders = vec![self.path.clone()];
        let mut at = 0;
        while at < folders.len() {
            let below = subfolders(&folders[at]);
            folders.extend(below);
            at += 1;
        }
        for folder in folders.iter().rev() {
            match fs::remove_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The cgroup that a process is in.
pub(crate) fn of_process(pid: Pid) -> io::Result<Cgroup> {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero()))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(Cgroup::at)
        .ok_or_else(|| io::Error::other("the process is in no cgroup of version 2"))
}

/// What containers' resources are limited and counted with.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Lets containers' cgroups use the controllers, as far as the kernel has them.
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

/// Waits until `key` in an open `cgroup.events` has a value. `false` if it has not within `patience`.
pub(crate) fn wait_for_event(events: &File, key: &str, value: u64, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
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

/// What is in a small cgroup file now.
fn read_from_start(file: &File) -> io::Result<String> {
    let mut bytes = [0; 512];
    let read = file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..read]).into_owned())
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// A cgroup's `memory.events`, watched for kills.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    file: File,
    /// The number that its events carry.
    pub(crate) source_number: u32,
    seen_kills: u64,
}

impl MemoryWatch {
    /// Starts watching from zero kills.
    pub(crate) fn open(cgroup: &Cgroup, source_number: u32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(cgroup.file("memory.events"))?,
            source_number,
            seen_kills: 0,
        })
    }

    /// Whether the kernel has killed for want of memory since the last call.
    pub(crate) fn has_new_kills(&mut self) -> bool {
        let kills = oom_kills(&read_from_start(&self.file).unwrap_or_default());
        let again = kills > self.seen_kills;
        self.seen_kills = self.seen_kills.max(kills);
        again
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
    fn cgroup_of_a_container_is_no_file_of_the_root() {
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
