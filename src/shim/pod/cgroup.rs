//! The host's control group of a pod: what its machine costs is counted and limited where the
//! container's own processes would be. The shim itself stays outside.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

/// Where cgroup v2 is mounted on every host that has no other.
const ROOT: &str = "/sys/fs/cgroup";

/// A control group for a pod.
#[derive(Debug)]
pub(crate) struct ControlGroup {
    folder: PathBuf,
}

impl ControlGroup {
    /// The group that `linux.cgroupsPath` names, below the host's cgroup v2; not made yet. `None`
    /// where the host has none, or the path is no path below it: the machine then stays in the
    /// shim's group.
    pub(crate) fn at(path: &str) -> Option<Self> {
        if !Path::new(ROOT).join("cgroup.controllers").exists() {
            return None;
        }
        let group = relative(path).map(|path| Self {
            folder: Path::new(ROOT).join(path),
        });
        if group.is_none() {
            log::warn!("linux.cgroupsPath {path:?} cannot be used: the machine stays in the shim's control group");
        }
        group
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// How much memory it may hold, in bytes: the least that it or one above it may (`memory.max`, Linux
    /// cgroup-v2.rst). `None` where nothing bounds it. A kubelet has made and limited a pod's before the pod.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        let limit = |folder: &Path| -> Option<u64> {
            let text = fs::read_to_string(folder.join("memory.max")).ok()?;
            // Else it is "max".
            text.trim().parse().ok()
        };
        self.folder.ancestors().filter_map(limit).min()
    }

    /// Makes it, and what is missing above it.
    pub(crate) fn make(&self) {
        if let Err(error) = fs::create_dir_all(&self.folder) {
            log::warn!("make control group {}: {error}", self.folder.display());
        }
    }

    /// Moves a process into it.
    pub(crate) fn add(&self, pid: u32) {
        if let Err(error) = fs::write(self.folder.join("cgroup.procs"), pid.to_string()) {
            log::warn!("move process {pid} to {}: {error}", self.folder.display());
        }
    }

    /// Removes it; nobody may be in it any more.
    pub(crate) fn remove(&self) {
        match fs::remove_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("remove control group {}: {error}", self.folder.display());
            }
            _ => {}
        }
    }
}

/// Where `linux.cgroupsPath` is below the root. With the systemd driver it is `slice:prefix:name`,
/// and `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn relative(path: &str) -> Option<PathBuf> {
    let relative = match *path.split(':').collect::<Vec<_>>() {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => {
            let stem = slice.strip_suffix(".slice")?;
            let mut folder = PathBuf::new();
            for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
                folder.push(format!("{}.slice", &stem[..end]));
            }
            folder.join(format!("{prefix}-{name}.scope"))
        }
        _ => return None,
    };
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && relative != Path::new("")).then_some(relative)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_both_drivers_are_placed_and_others_refused() {
        for (path, place) in [
            ("/default/a", Some("default/a")),
            ("kubepods/burstable/podx/y", Some("kubepods/burstable/podx/y")),
            ("system.slice:nerdctl:abc", Some("system.slice/nerdctl-abc.scope")),
            (
                "kubepods-burstable-podx.slice:cri-containerd:y",
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-y.scope"),
            ),
            ("", None),
            ("/", None),
            ("../a", None),
            ("/a/../../b", None),
            ("a:b", None),
            ("notaslice:b:c", None),
            ("a.slice:b:../../c", None),
        ] {
            assert_eq!(relative(path), place.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn memory_is_bounded_by_the_narrowest_group_of_those_above() {
        let root = tempfile::tempdir().unwrap();
        let group = ControlGroup {
            folder: root.path().join("kubepods/pod/sandbox"),
        };
        assert_eq!(group.memory_limit(), None);
        group.make();
        let limit = |path: &str, text: &str| fs::write(root.path().join(path).join("memory.max"), text).unwrap();
        limit("kubepods/pod/sandbox", "max\n");
        assert_eq!(group.memory_limit(), None);
        limit("kubepods/pod", "1207959552\n");
        limit("kubepods", "8589934592\n");
        assert_eq!(group.memory_limit(), Some(1152 << 20));
    }

    #[test]
    fn removal_leaves_the_groups_above() {
        let root = tempfile::tempdir().unwrap();
        let group = ControlGroup {
            folder: root.path().join("default/a"),
        };
        group.make();
        assert!(root.path().join("default/a").is_dir());
        group.remove();
        group.remove();
        assert!(root.path().join("default").is_dir());
        assert!(!root.path().join("default/a").exists());
    }
}
