//! Directories below another one, whose files are not trusted: no symbolic link is followed, and no mount point is
//! crossed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

/// Opens the directory `path` below `root`, which is `root` itself if the path is empty (`O_PATH`).
///
/// # Errors
///
/// A part of the path does not exist, or is a symbolic link or a mount point.
pub(super) fn open_directory(root: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = if path == Path::new("") { Path::new(".") } else { path };
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Creates the directory `path` below `root`, with the permission bits `mode`, and a user and group id. Its parent must
/// exist. A directory that exists is kept as it is.
///
/// # Errors
///
/// Those of [`open_directory`] for its parent, or the directory cannot be created.
pub(super) fn create_directory(root: impl AsFd, path: &Path, mode: u32, (uid, gid): (u32, u32)) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let parent = open_directory(root, parent)?;
    let mode = Mode::from_raw_mode(mode);
    match rustix::fs::mkdirat(&parent, name, mode) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    // The umask has restricted the mode of mkdir(2).
    Ok(rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn directories_are_created_and_opened_without_following_links() {
        let outside = std::env::temp_dir().join(format!("beneath-{}", std::process::id()));
        let folder = outside.join("root");
        fs::create_dir_all(folder.join("a")).unwrap();
        symlink("..", folder.join("up")).unwrap();
        symlink("a", folder.join("same")).unwrap();
        let root = File::open(&folder).unwrap();
        let (uid, gid) = (folder.metadata().unwrap().uid(), folder.metadata().unwrap().gid());
        let create = |path: &str| create_directory(&root, Path::new(path), 0o777, (uid, gid));

        create("a/new").unwrap();
        create("b").unwrap();
        create("a").unwrap();
        create("same").unwrap();
        for path in ["up/c", "same/c", "missing/c"] {
            create(path).unwrap_err();
        }

        assert_eq!(fs::metadata(folder.join("a/new")).unwrap().mode() & 0o7777, 0o777);
        for path in ["", "a/new", "b"] {
            open_directory(&root, Path::new(path)).unwrap();
        }
        for path in ["up", "same", "..", "/", "missing"] {
            open_directory(&root, Path::new(path)).unwrap_err();
        }
        assert!(!outside.join("c").exists() && !folder.join("a/c").exists());
        fs::remove_dir_all(outside).unwrap();
    }
}
