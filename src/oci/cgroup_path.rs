//! The control group of a container or a pod on the host: `linux.cgroupsPath`, as runc understands it.

use std::path::{Component, Path, PathBuf};

/// A control group below the root of cgroup v2, which may not exist yet. Neither path is empty or has `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CgroupPath {
    /// Below the root.
    Absolute(PathBuf),
    /// Below the parent of the runtime's own group (runc `libcontainer/cgroups/fs2`).
    Relative(PathBuf),
}

impl CgroupPath {
    /// Parses the value, which has the form of one of runc's two cgroup drivers. `None` if it is empty, which selects
    /// no group. An error is the reason.
    ///
    /// - cgroupfs: a path. As in runc, `..` does not lead out of the root.
    /// - systemd: `slice:prefix:name`. By default the slice is `system.slice`, and the unit is a scope.
    pub(super) fn parse(text: &str) -> Result<Option<Self>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let group = match (text.starts_with('/'), text.contains(':')) {
            (true, _) => Self::Absolute(clean(text)),
            (false, true) => Self::Absolute(expand_unit(text)?),
            (false, false) => Self::Relative(clean(text)),
        };
        let (Self::Absolute(path) | Self::Relative(path)) = &group;
        match path.as_os_str().is_empty() {
            true => Err(format!(
                "{text:?} does not name a control group: use one below the root"
            )),
            false => Ok(Some(group)),
        }
    }
}

/// Resolves `.` and `..` without looking at files, as if `path` were absolute.
fn clean(path: &str) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => _ = cleaned.pop(),
            _ => {}
        }
    }
    cleaned
}

/// The path of the unit that `slice:prefix:name` means. `a-b.slice` is below `a.slice`, and `-.slice` is the root
/// (systemd.slice(5)).
fn expand_unit(text: &str) -> Result<PathBuf, String> {
    let malformed =
        || format!("{text:?} is neither a path nor the name of a systemd unit, which has the form slice:prefix:name");
    let [slice, prefix, name] = *text.split(':').collect::<Vec<_>>() else {
        return Err(malformed());
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").ok_or_else(malformed)?;
    let mut path = PathBuf::new();
    if stem != "-" {
        if stem.split('-').any(str::is_empty) {
            return Err(malformed());
        }
        for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
            path.push(format!("{}.slice", &stem[..end]));
        }
    }
    if name.is_empty() || text.contains('/') {
        return Err(malformed());
    }
    path.push(match name.ends_with(".slice") {
        true => name.to_owned(),
        false => format!("{prefix}-{name}.scope"),
    });
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_runc() {
        for (text, expected) in [
            ("/default/a", "/default/a"),
            ("/a/../../b/./c/", "/b/c"),
            ("/a:b/c:d:e", "/a:b/c:d:e"),
            ("kubepods/burstable/podx/y", "kubepods/burstable/podx/y"),
            ("../a", "a"),
            ("a/../../../b", "b"),
            ("system.slice:nerdctl:abc", "/system.slice/nerdctl-abc.scope"),
            (
                "kubepods-burstable-podx.slice:cri-containerd:y",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-y.scope",
            ),
            (":docker:abc", "/system.slice/docker-abc.scope"),
            ("-.slice:docker:abc", "/docker-abc.scope"),
            ("a.slice::b", "/a.slice/-b.scope"),
            ("a.slice:docker:b.slice", "/a.slice/b.slice"),
        ] {
            let expected = match expected.strip_prefix('/') {
                Some(path) => CgroupPath::Absolute(path.into()),
                None => CgroupPath::Relative(expected.into()),
            };
            assert_eq!(CgroupPath::parse(text), Ok(Some(expected)), "{text}");
        }
        assert_eq!(CgroupPath::parse(""), Ok(None));
    }

    #[test]
    fn value_that_names_no_group_is_an_error_with_the_reason() {
        for (text, reason) in [
            ("/", "below the root"),
            (".", "root"),
            ("..", "root"),
            ("/a/..", "root"),
            ("a:b", "slice:prefix:name"),
            ("a.slice:b:c:d", "slice:prefix:name"),
            ("notaslice:b:c", "slice:prefix:name"),
            ("a--b.slice:c:d", "slice:prefix:name"),
            (".slice:c:d", "slice:prefix:name"),
            ("a.slice:b:", "slice:prefix:name"),
            ("a.slice:b:../../c", "slice:prefix:name"),
            ("a/b.slice:c:d", "slice:prefix:name"),
        ] {
            let error = CgroupPath::parse(text).unwrap_err();
            assert!(
                error.contains(reason) && error.contains(&format!("{text:?}")),
                "{text}: {error}"
            );
        }
    }
}
