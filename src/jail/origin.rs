//! The ids of a jailed process and its parent in the shim's pid namespace. In its own namespace the process has pid 1,
//! and no parent.

use std::{
    env,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
};

use super::error::JailError;

/// `/proc/self/stat` of the shim's /proc. It shows the parent at the time of each read.
#[derive(Debug)]
pub(super) struct Origin {
    stat: File,
}

impl Origin {
    /// Call it before the root changes.
    pub(super) fn open() -> io::Result<Self> {
        let stat = File::open("/proc/self/stat")?;
        Ok(Self { stat })
    }

    pub(super) fn pid(&self) -> io::Result<u32> {
        self.read().map(|(pid, _)| pid)
    }

    /// 0 if the parent is outside of the shim's pid namespace.
    pub(super) fn parent_pid(&self) -> io::Result<u32> {
        self.read().map(|(_, parent)| parent)
    }

    fn read(&self) -> io::Result<(u32, u32)> {
        let mut text = [0; 128];
        let length = self.stat.read_at(&mut text, 0)?;
        let text = text.get(..length).unwrap_or_default();
        parse(&String::from_utf8_lossy(text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for Origin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stat.as_fd()
    }
}

/// The fields 1 and 4 of `/proc/pid/stat` (proc_pid_stat(5)). Field 2 is the name in parentheses, and may contain any
/// character.
fn parse(stat: &str) -> Option<(u32, u32)> {
    let (pid, _) = stat.split_once(' ')?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    let parent = after_name.split(' ').nth(1)?;
    Some((pid.parse().ok()?, parent.parse().ok()?))
}

/// The pid of the shim, as [`super::RoleCommand`] wrote it.
pub(super) fn parent_from_arguments() -> Result<u32, JailError> {
    env::args_os()
        .nth(2)
        .and_then(|pid| pid.to_str()?.parse().ok())
        .ok_or(JailError::NotStartedByShim)
}

/// Opens the namespace that the shim's descriptor `number` refers to. The shim must keep the descriptor open until this
/// process is in its jail. Call it before [`super::enter`].
///
/// # Errors
///
/// This role was not started by the shim, or the error of open(2).
pub(crate) fn open_namespace_of_parent(number: RawFd) -> io::Result<OwnedFd> {
    let parent = parent_from_arguments().map_err(io::Error::other)?;
    Ok(File::open(format!("/proc/{parent}/fd/{number}"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_and_parent_are_found_behind_any_name() {
        for (stat, expected) in [
            ("12 (exe) S 7 12 12 0", Some((12, 7))),
            ("12 (a) S 9 (b) R 7 12", Some((12, 7))),
            ("12 () ) S 0 1", Some((12, 0))),
            ("12 (exe) S", None),
            ("x (exe) S 7 1", None),
            ("", None),
        ] {
            assert_eq!(parse(stat), expected, "{stat:?}");
        }
    }

    #[test]
    fn origin_is_that_of_this_process() {
        let origin = Origin::open().unwrap();
        assert_eq!(origin.pid().unwrap(), std::process::id());
        assert_eq!(origin.parent_pid().unwrap(), std::os::unix::process::parent_id());
    }
}
