//! What the source of a bind mount is: the one look at the host that planning needs, taken through
//! a function so that the translation itself stays pure.

use std::{
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use rustix::fs::{major, minor};

/// What is at a path, symbolic links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKind {
    /// A directory or regular file.
    Tree,
    /// A tmpfs that was made for shared memory: it is mounted here, under the name `shm`.
    SharedMemory {
        /// In bytes.
        size: u64,
    },
    /// A directory or file of the host's kernel: procfs, sysfs, cgroup file systems.
    Kernel,
    /// On a hugetlbfs.
    HugePages,
    /// A character device.
    Character {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A block device.
    Block,
    /// A Unix socket.
    Socket,
    /// A named pipe.
    Fifo,
}

/// Looks at a source.
pub(crate) type Inspect<'a> = &'a dyn Fn(&Path) -> io::Result<SourceKind>;

impl SourceKind {
    /// Looks at `path` on this host.
    ///
    /// # Errors
    ///
    /// As stat(2) and statfs(2): mostly that nothing is there.
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

/// Whether a file system named `shm` is mounted at `path`, as containerd's CRI, nerdctl and Docker
/// mount it (proc_pid_mountinfo(5)).
fn is_shared_memory(path: &Path) -> io::Result<bool> {
    let path = path.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // The last that is mounted there is the one that is seen.
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
    fn sources_of_this_host_are_told_apart() {
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
