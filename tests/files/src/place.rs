//! The directory of a case, and what cases do again and again.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, Stat, Uid},
    io::Errno,
};

/// `Err` is the reason of a failure.
pub(crate) type Outcome = Result<(), String>;

/// What a case checks, and the function that does it in an empty directory.
pub(crate) type Case = (&'static str, fn(&Place) -> Outcome);

/// Users without privileges.
pub(crate) const OWNER: u32 = 1001;
pub(crate) const STRANGER: u32 = 1002;
/// A group of both.
pub(crate) const GROUP: u32 = 2000;

/// An empty directory in which all users may create files.
pub(crate) struct Place {
    path: PathBuf,
}

impl Place {
    pub(crate) fn create(path: PathBuf) -> Result<Self, String> {
        text(fs::create_dir(&path))?;
        text(rustix::fs::chmod(&path, Mode::from_raw_mode(0o777)))?;
        Ok(Self { path })
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(&self) -> Outcome {
        text(fs::remove_dir_all(&self.path))
    }

    pub(crate) fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Creates a file with these contents, of root, with the mode 0644.
    pub(crate) fn file(&self, name: &str, contents: &str) -> Result<PathBuf, String> {
        let path = self.at(name);
        text(fs::write(&path, contents))?;
        Ok(path)
    }

    /// Creates an empty file of a user and a group, with a mode.
    pub(crate) fn file_of(&self, name: &str, uid: u32, gid: u32, mode: u32) -> Result<PathBuf, String> {
        let path = self.file(name, "")?;
        set_owner(&path, uid, gid)?;
        text(rustix::fs::chmod(&path, Mode::from_raw_mode(mode)))?;
        Ok(path)
    }

    /// Creates a directory of a user and a group, with a mode.
    pub(crate) fn directory_of(&self, name: &str, uid: u32, gid: u32, mode: u32) -> Result<PathBuf, String> {
        let path = self.at(name);
        text(fs::create_dir(&path))?;
        set_owner(&path, uid, gid)?;
        text(rustix::fs::chmod(&path, Mode::from_raw_mode(mode)))?;
        Ok(path)
    }
}

/// Changes the owner and the group of a file, and not those of the target of a link.
pub(crate) fn set_owner(path: &Path, uid: u32, gid: u32) -> Outcome {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    text(rustix::fs::chownat(
        CWD,
        path,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    ))
}

/// Runs `work` as a user without privileges whose only further group is [`GROUP`].
pub(crate) fn run_as<T: Send>(user: u32, work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
            text(rustix::thread::set_thread_groups(&[Gid::from_raw(GROUP)]))?;
            text(rustix::thread::set_thread_res_gid(gid, gid, gid))?;
            text(rustix::thread::set_thread_res_uid(uid, uid, uid))?;
            work()
        });
        thread.join().map_err(|_| "the case panicked".to_owned())?
    })
}

/// The status of a file, and not that of the target of a link.
pub(crate) fn status(path: &Path) -> Result<Stat, String> {
    rustix::fs::lstat(path).map_err(|error| format!("stat of {}: {error}", path.display()))
}

/// The permission bits of a file, with set-id and sticky bit.
pub(crate) fn mode(path: &Path) -> Result<u32, String> {
    Ok(status(path)?.st_mode & 0o7777)
}

/// The time of the last change of the status, in seconds and nanoseconds.
pub(crate) fn changed(path: &Path) -> Result<(i64, u64), String> {
    let status = status(path)?;
    Ok((status.st_ctime, status.st_ctime_nsec))
}

/// The time of the last change of the contents, in seconds and nanoseconds.
pub(crate) fn modified(path: &Path) -> Result<(i64, u64), String> {
    let status = status(path)?;
    Ok((status.st_mtime, status.st_mtime_nsec))
}

/// Waits until the clock of file systems has a new value: the kernel's tick is at most 10 ms.
pub(crate) fn wait_for_the_next_tick() {
    thread::sleep(std::time::Duration::from_millis(25));
}

/// The text of an error.
pub(crate) fn text<T, E: ToString>(result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

/// Fails unless the call failed with this error.
pub(crate) fn refused<T: Debug>(result: rustix::io::Result<T>, expected: Errno) -> Outcome {
    match result {
        Err(error) if error == expected => Ok(()),
        other => Err(format!("{other:?} instead of {expected:?}")),
    }
}

/// Fails unless both are equal.
pub(crate) fn equal<T: PartialEq + Debug>(actual: T, expected: T) -> Outcome {
    match actual == expected {
        true => Ok(()),
        false => Err(format!("{actual:?} instead of {expected:?}")),
    }
}

/// Fails with `reason` unless `condition` holds.
pub(crate) fn ensure(condition: bool, reason: &str) -> Outcome {
    match condition {
        true => Ok(()),
        false => Err(reason.to_owned()),
    }
}
