//! Mounts the virtio-fs device with the pod's shared directories, and those that several containers use.
//!
//! The kernel mounts a shared directory when a process reaches it first, once in each mount namespace. Each time it
//! makes another file system, with other inodes. So the agent reaches a directory before the containers do, which get a
//! copy of its mount, and unmounts it after its last container.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nutshell_protocol::{COMMON_SHARES, SHARE_PATH, SHARE_TAG};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags};

use crate::sys;

/// Has a directory for each mount below [`COMMON_SHARES`], with an empty file for each container that uses it.
const USERS_PATH: &str = "/run/nutshell/share-users";

/// Mounts the share at [`SHARE_PATH`] unless it is mounted already.
pub(crate) fn mount() -> io::Result<()> {
    fs::create_dir_all(SHARE_PATH)?;
    let _lock = lock(Path::new(SHARE_PATH).parent().unwrap_or(Path::new("/")))?;
    if !is_mounted()? {
        rustix::mount::mount(SHARE_TAG, SHARE_PATH, "virtiofs", MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Mounts `source` for a container of the pod, if it is in [`COMMON_SHARES`]. The device must be mounted.
pub(crate) fn mount_common(source: &Path, container: &str) -> io::Result<()> {
    let common = Path::new(SHARE_PATH).join(COMMON_SHARES);
    let Some(name) = source.strip_prefix(common).ok().and_then(Path::file_name) else {
        return Ok(());
    };
    add_user(&Path::new(USERS_PATH).join(name), container)?;
    // Not while the lock is held: the file system may hang.
    rustix::mount::open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    Ok(())
}

/// Unmounts what only this container uses in [`COMMON_SHARES`]. Call this in a job. A separate process unmounts it,
/// which does not delay the deletion of the container if the file system hangs: the kernel asks the host for the path
/// of the mount. If that fails, the mount stays until the end of the machine.
pub(crate) fn leave_common(container: &str) -> io::Result<()> {
    remove_user(Path::new(USERS_PATH), container, |name, users, lock| {
        if sys::fork()?.is_some() {
            return Ok(());
        }
        sys::close_all_but(&[lock.as_fd()]);
        let path = Path::new(SHARE_PATH).join(COMMON_SHARES).join(name);
        let unmounted = match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            // The container was not created completely, or the host does not share it any more.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => fs::remove_dir(users),
            Err(error) => Err(error.into()),
        };
        sys::exit_now(unmounted.is_err().into())
    })
}

fn add_user(users: &Path, container: &str) -> io::Result<()> {
    loop {
        fs::create_dir_all(users)?;
        let lock = lock(users)?;
        // The last user may have removed the directory before the lock was free.
        if rustix::fs::fstat(&lock)?.st_nlink > 0 {
            return fs::write(users.join(container), "");
        }
    }
}

/// Calls `unmount` for each directory in `path` that has no other user: with its name, its path and its lock, which
/// keeps new users waiting until the end of the unmount. `unmount` removes the directory. Continues after an error and
/// returns the first one.
fn remove_user(
    path: &Path,
    container: &str,
    unmount: impl Fn(&Path, &Path, &OwnedFd) -> io::Result<()>,
) -> io::Result<()> {
    let directories = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        directories => directories?,
    };
    let mut result = Ok(());
    for entry in directories {
        let entry = entry?;
        if entry.path().join(container).exists() {
            let name = entry.file_name();
            let unmount = |lock: &OwnedFd| unmount(Path::new(&name), &entry.path(), lock);
            result = result.and(remove_user_of(&entry.path(), container, unmount));
        }
    }
    result
}

fn remove_user_of(users: &Path, container: &str, unmount: impl FnOnce(&OwnedFd) -> io::Result<()>) -> io::Result<()> {
    // No unmount holds the lock: it begins only when there are no users, and this container is one.
    let lock = lock(users)?;
    fs::remove_file(users.join(container))?;
    match fs::read_dir(users)?.next() {
        Some(_) => Ok(()),
        None => unmount(&lock),
    }
}

/// Excludes other jobs, which may create or delete containers at the same time.
fn lock(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let lock = rustix::fs::open(directory, flags, Mode::empty())?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    Ok(lock)
}

fn is_mounted() -> io::Result<bool> {
    let parent = Path::new(SHARE_PATH).parent().unwrap_or(Path::new("/"));
    Ok(rustix::fs::stat(SHARE_PATH)?.st_dev != rustix::fs::stat(parent)?.st_dev)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn directory_is_unmounted_with_its_last_user() {
        let path = std::env::temp_dir().join(format!("agent-share-users-{}", std::process::id()));
        for (name, container) in [("0", "c1"), ("0", "c2"), ("1", "c2"), ("2", "c3")] {
            add_user(&path.join(name), container).unwrap();
        }
        let unmounted_with = |container| {
            let names = RefCell::new(Vec::new());
            remove_user(&path, container, |name, users, _| {
                names.borrow_mut().push(name.display().to_string());
                fs::remove_dir(users)
            })
            .unwrap();
            let mut names = names.into_inner();
            names.sort();
            names
        };

        assert_eq!(unmounted_with("c1"), [""; 0]);
        assert_eq!(unmounted_with("c2"), ["0", "1"]);
        assert_eq!(unmounted_with("c2"), [""; 0]);
        assert_eq!(unmounted_with("c3"), ["2"]);
        fs::remove_dir(path).unwrap();
    }
}
