//! The pod's control group on the host. The processes of the machine are counted and limited there, where runc would
//! put the processes of the containers. The shim itself stays outside.

use std::{
    fs,
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::XattrFlags,
};

use crate::{oci::CgroupPath, shim::blocking};

/// The mount point of cgroup v2 on a host without cgroup v1.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How long killed processes may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// The extended attribute of groups that could not be removed. The kernel keeps it as long as the group.
const LEFT_BEHIND: &str = "trusted.nutshell.left_behind";

/// A failed change of a control group.
#[derive(Debug, thiserror::Error)]
#[error("control group {}: cannot {step}: {source}", path.display())]
pub(crate) struct CgroupError {
    path: PathBuf,
    step: &'static str,
    source: io::Error,
}

/// A control group, which may not exist yet.
#[derive(Debug, Clone)]
pub(super) struct ControlGroup {
    path: PathBuf,
}

impl ControlGroup {
    /// The group at `path`. `None` if the host has no cgroup v2: the machine then stays in the shim's group.
    pub(super) fn find(path: &CgroupPath) -> Result<Option<Self>, CgroupError> {
        let root = Path::new(CGROUP_ROOT);
        if !root.join("cgroup.controllers").exists() {
            return Ok(None);
        }
        let path = match path {
            CgroupPath::Absolute(path) => root.join(path),
            CgroupPath::Relative(path) => root.join(parent_of_own_group()?).join(path),
        };
        Ok(Some(Self { path }))
    }

    /// The absolute path of the group.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The memory limit of the group, in bytes: the smallest `memory.max` of the group and its ancestors (kernel,
    /// `Documentation/admin-guide/cgroup-v2.rst`). `None` means unlimited. The kubelet creates and limits the parent of
    /// a pod's group before it creates the pod.
    pub(super) fn memory_limit(&self) -> Option<u64> {
        let limit = |folder: &Path| -> Option<u64> {
            let text = fs::read_to_string(folder.join("memory.max")).ok()?;
            // "max" means unlimited and does not parse.
            text.trim().parse().ok()
        };
        self.path.ancestors().filter_map(limit).min()
    }

    /// Creates the group with its ancestors. Removes the groups beside it that have been left behind.
    pub(super) fn create(&self) -> Result<(), CgroupError> {
        fs::create_dir_all(&self.path).map_err(|source| self.error("create it", source))?;
        // This group may have been left behind, too. Without the attribute, other shims do not remove the group before
        // a process is in it.
        let _ = rustix::fs::removexattr(&self.path, LEFT_BEHIND);
        remove_left_behind(self.path.parent().unwrap_or(&self.path));
        Ok(())
    }

    /// Moves a process into the group.
    pub(super) fn add_process(&self, pid: u32) -> Result<(), CgroupError> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .map_err(|source| self.error("move a process into it", source))
    }

    fn error(&self, step: &'static str, source: io::Error) -> CgroupError {
        CgroupError {
            path: self.path.clone(),
            step,
            source,
        }
    }

    /// Sends SIGKILL to all processes in the group and does not wait for their end.
    pub(super) fn kill(&self) {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Linux has `cgroup.kill` since 5.14; without it, `remove` fails and reports the group.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!(
                    "cannot kill the processes of control group {}: {error}",
                    self.path.display()
                );
            }
            _ => {}
        }
    }

    /// Removes the group, but not its ancestors. Kills processes that are still in the group: a vmm that its guest
    /// controls may have forked, and the fork has the pod's devices.
    pub(super) async fn remove(&self) {
        let mut removed = fs::remove_dir(&self.path);
        if matches!(&removed, Err(error) if error.kind() == io::ErrorKind::ResourceBusy) {
            log::warn!(
                "killing the processes that are left in control group {}",
                self.path.display()
            );
            let path = self.path.clone();
            let killed = blocking::run("kill the processes of a control group", move || kill_processes(&path)).await;
            if let Err(error) = killed.map_err(io::Error::other).flatten() {
                log::warn!(
                    "cannot kill the processes of control group {}: {error}",
                    self.path.display()
                );
            }
            removed = fs::remove_dir(&self.path);
        }
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("cannot remove control group {}: {error}", self.path.display());
                leave_behind(&self.path);
            }
            _ => {}
        }
    }
}

/// Marks a group that cannot be removed, because it has processes that do not end: a file server may wait for a volume
/// that hangs. When they have ended, the next shim that creates a group beside it removes it.
pub(crate) fn leave_behind(group: &Path) {
    if let Err(error) = rustix::fs::setxattr(group, LEFT_BEHIND, b"", XattrFlags::empty()) {
        log::warn!(
            "cannot mark control group {}, so it is not removed when its processes have ended: {error}",
            group.display()
        );
    }
}

/// Whether the group at `path` is marked ([`leave_behind`]).
pub(crate) fn is_left_behind(path: &Path) -> bool {
    rustix::fs::getxattr(path, LEFT_BEHIND, &mut [0_u8; 0]).is_ok()
}

/// Removes the groups in `parent` that are marked and empty. Ignores failures: another shim may remove them too.
fn remove_left_behind(parent: &Path) {
    for group in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = group.path();
        if is_left_behind(&path) {
            // The kernel refuses the removal of a group that has processes.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Kills all processes in the group at `path`, and waits until they have ended, for at most [`KILL_TIMEOUT`]:
/// `cgroup.kill` and the notification of `cgroup.events` (kernel, `Documentation/admin-guide/cgroup-v2.rst`).
fn kill_processes(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + KILL_TIMEOUT;
    let mut events = fs::File::open(path.join("cgroup.events"))?;
    fs::write(path.join("cgroup.kill"), "1")?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "they do not end after SIGKILL"));
        }
    }
}

/// The parent of the group of this process, relative to the root (cgroups(7), `/proc/pid/cgroup`).
fn parent_of_own_group() -> Result<PathBuf, CgroupError> {
    const OWN_GROUP: &str = "/proc/self/cgroup";
    let parse = |text: String| {
        let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        Some(Path::new(group).parent().map(Path::to_owned).unwrap_or_default())
    };
    fs::read_to_string(OWN_GROUP)
        .and_then(|text| parse(text).ok_or_else(|| io::Error::other("it has no line for cgroup v2")))
        .map_err(|source| CgroupError {
            path: OWN_GROUP.into(),
            step: "find the shim's control group",
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_limit_is_the_smallest_of_the_group_and_its_ancestors() {
        let root = tempfile::tempdir().unwrap();
        let group = ControlGroup {
            path: root.path().join("kubepods/pod/sandbox"),
        };
        assert_eq!(group.memory_limit(), None);
        group.create().unwrap();
        let limit = |path: &str, text: &str| fs::write(root.path().join(path).join("memory.max"), text).unwrap();
        limit("kubepods/pod/sandbox", "max\n");
        assert_eq!(group.memory_limit(), None);
        limit("kubepods/pod", "1207959552\n");
        limit("kubepods", "8589934592\n");
        assert_eq!(group.memory_limit(), Some(1152 << 20));
    }

    #[test]
    fn failed_changes_name_the_group() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let group = ControlGroup {
            path: root.path().join("file/a"),
        };
        for failed in [group.create(), group.add_process(1)] {
            let text = failed.unwrap_err().to_string();
            assert!(text.contains(&group.path.display().to_string()), "{text}");
        }
    }

    #[test]
    fn groups_that_were_left_behind_are_removed_when_they_are_empty() {
        let root = tempfile::tempdir().unwrap();
        let group = |name: &str| ControlGroup {
            path: root.path().join(name),
        };
        for name in ["empty", "used", "other", "own"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        // Like a process, a file prevents the removal.
        fs::write(root.path().join("used/file"), "").unwrap();
        for name in ["empty", "used", "own"] {
            leave_behind(&root.path().join(name));
        }

        group("own").create().unwrap();

        let exists = |name: &str| root.path().join(name).exists();
        assert_eq!(["empty", "used", "other", "own"].map(exists), [false, true, true, true]);
        fs::remove_file(root.path().join("used/file")).unwrap();
        group("next").create().unwrap();
        assert_eq!(["used", "other", "own", "next"].map(exists), [false, true, true, true]);
    }

    #[tokio::test]
    async fn removal_keeps_the_ancestors() {
        let root = tempfile::tempdir().unwrap();
        let group = ControlGroup {
            path: root.path().join("default/a"),
        };
        group.create().unwrap();
        assert!(root.path().join("default/a").is_dir());
        group.remove().await;
        group.remove().await;
        assert!(root.path().join("default").is_dir());
        assert!(!root.path().join("default/a").exists());
    }
}
