//! Sources of bind mounts. Planning inspects them on the host through a function, so that the translation itself stays
//! pure.

use std::{
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use rustix::fs::{major, minor};

/// The kind of file at a path, after symbolic links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKind {
    /// A directory or regular file.
    Tree,
    /// The mount point of a tmpfs whose mount source is `shm`: shared memory.
    SharedMemory {
        /// In bytes.
        size: u64,
    },
    /// On a kernel file system of the host: procfs, sysfs, cgroup.
    Kernel,
    /// On a hugetlbfs.
    HugePages,
    Character {
        major: u32,
        minor: u32,
    },
    Block,
    Socket,
    Fifo,
}

/// Inspects a source on the host, as [`SourceKind::inspect`] does.
pub(crate) type Inspect<'a> = &'a dyn Fn(&Path) -> io::Result<SourceKind>;

impl SourceKind {
    /// Inspects `path` on this host.
    ///
    /// # Errors
    ///
    /// Those of stat(2) and statfs(2), most often that the path does not exist.
    pub(crate) fn inspect(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let kind = metadata.file_type();
        if kind.is_char_device() {
            return Ok(Self::Character {
                major: major(metadata.rdev()),
                minor: minor(metadata.rdev()),
            });
        }
        if kind.is_block_device() {
            return Ok(Self::Block);
        }
        if kind.is_socket() {
            return Ok(Self::Socket);
        }
        if kind.is_fifo() {
            return Ok(Self::Fifo);
        }
        let system = rustix::fs::statfs(path)?;
        Ok(match system.f_type {
            libc::TMPFS_MAGIC if is_shared_memory(path)? => Self::SharedMemory {
                size: system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs()),
            },
            libc::HUGETLBFS_MAGIC => Self::HugePages,
            libc::PROC_SUPER_MAGIC | libc::SYSFS_MAGIC | libc::CGROUP_SUPER_MAGIC | libc::CGROUP2_SUPER_MAGIC => {
                Self::Kernel
            }
            _ => Self::Tree,
        })
    }
}

/// Whether the mount source at `path` is `shm`, which containerd's CRI, nerdctl and Docker give to a tmpfs for shared
/// memory (proc_pid_mountinfo(5)).
fn is_shared_memory(path: &Path) -> io::Result<bool> {
    let path = path.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // The last mount at a path hides the others.
    let last = mounts.lines().rev().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let is_here = Path::new(mount.split(' ').nth(4)?) == path;
        is_here.then(|| system.split(' ').nth(1) == Some("shm"))
    });
    Ok(last.unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn kinds_of_sources_are_recognized() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/proc/version", &link).unwrap();
        for (path, kind) in [
            (directory.path(), SourceKind::Tree),
            (&file, SourceKind::Tree),
            (&socket, SourceKind::Socket),
            (&link, SourceKind::Kernel),
            (Path::new("/dev/null"), SourceKind::Character { major: 1, minor: 3 }),
        ] {
            assert_eq!(SourceKind::inspect(path).unwrap(), kind, "{}", path.display());
        }
        let missing = SourceKind::inspect(&directory.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
