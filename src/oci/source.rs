//! Sources of bind mounts. Planning inspects them on the host through [`Inspect`], so that the translation itself stays
//! pure.

use std::{
    cell::OnceCell,
    ffi::OsString,
    io,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{StatVfsMountFlags, major, minor};

/// The kind of file at a path, after symbolic links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKind {
    Directory,
    /// A regular file.
    File,
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

/// Inspects sources of bind mounts.
pub(crate) trait Inspect {
    /// The kind of file at `path`.
    ///
    /// # Errors
    ///
    /// The errors of stat(2) and statfs(2), most often that the path does not exist.
    fn kind(&self, path: &Path) -> io::Result<SourceKind>;

    /// Whether something is mounted below the directory `path`.
    ///
    /// # Errors
    ///
    /// The errors of realpath(3), and of reading the mount table.
    fn has_mounts_below(&self, path: &Path) -> io::Result<bool>;

    /// What the mount that contains `path` forbids on the host.
    ///
    /// # Errors
    ///
    /// The errors of statvfs(3).
    fn restrictions(&self, path: &Path) -> io::Result<MountRestrictions>;
}

/// The options of a mount that a bind mount of it keeps (mount(2), `MS_BIND`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MountRestrictions {
    /// Set-id bits and file capabilities have no effect.
    pub(crate) nosuid: bool,
    /// No program of it can be executed.
    pub(crate) noexec: bool,
}

/// Inspects this host. Reads the mount table at most once.
#[derive(Debug, Default)]
pub(crate) struct HostInspector {
    mounts: OnceCell<Vec<MountEntry>>,
}

/// A line of the mount table (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct MountEntry {
    mount_point: PathBuf,
    /// The source of its file system: a device, or any text.
    source: String,
}

impl Inspect for HostInspector {
    fn kind(&self, path: &Path) -> io::Result<SourceKind> {
        let metadata = std::fs::metadata(path)?;
        let kind = metadata.file_type();
        if kind.is_char_device() {
            return Ok(SourceKind::Character {
                major: major(metadata.rdev()),
                minor: minor(metadata.rdev()),
            });
        }
        if kind.is_block_device() {
            return Ok(SourceKind::Block);
        }
        if kind.is_socket() {
            return Ok(SourceKind::Socket);
        }
        if kind.is_fifo() {
            return Ok(SourceKind::Fifo);
        }
        let system = rustix::fs::statfs(path)?;
        Ok(match system.f_type {
            libc::TMPFS_MAGIC if self.is_shared_memory(path)? => SourceKind::SharedMemory {
                size: system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs()),
            },
            libc::HUGETLBFS_MAGIC => SourceKind::HugePages,
            libc::PROC_SUPER_MAGIC | libc::SYSFS_MAGIC | libc::CGROUP_SUPER_MAGIC | libc::CGROUP2_SUPER_MAGIC => {
                SourceKind::Kernel
            }
            _ if kind.is_dir() => SourceKind::Directory,
            _ => SourceKind::File,
        })
    }

    fn has_mounts_below(&self, path: &Path) -> io::Result<bool> {
        let path = path.canonicalize()?;
        Ok(has_mount_below(self.mounts()?, &path))
    }

    fn restrictions(&self, path: &Path) -> io::Result<MountRestrictions> {
        let flags = rustix::fs::statvfs(path)?.f_flag;
        Ok(MountRestrictions {
            nosuid: flags.contains(StatVfsMountFlags::NOSUID),
            noexec: flags.contains(StatVfsMountFlags::NOEXEC),
        })
    }
}

impl HostInspector {
    /// Whether the mount source at `path` is `shm`, which containerd's CRI, nerdctl and Docker give to a tmpfs for
    /// shared memory.
    fn is_shared_memory(&self, path: &Path) -> io::Result<bool> {
        let path = path.canonicalize()?;
        // The last mount at a path hides the others.
        let mut from_last = self.mounts()?.iter().rev();
        let last = from_last.find(|mount| mount.mount_point == path);
        Ok(last.is_some_and(|mount| mount.source == "shm"))
    }

    fn mounts(&self) -> io::Result<&[MountEntry]> {
        if let Some(mounts) = self.mounts.get() {
            return Ok(mounts);
        }
        let table = std::fs::read("/proc/self/mountinfo")?;
        Ok(self.mounts.get_or_init(|| parse_mounts(&table)))
    }
}

/// Whether the mount table (proc_pid_mountinfo(5)) of a process lists a mount below `path`, which is the real path.
pub(crate) fn lists_mount_below(table: &[u8], path: &Path) -> bool {
    has_mount_below(&parse_mounts(table), path)
}

fn has_mount_below(mounts: &[MountEntry], path: &Path) -> bool {
    let is_below = |mount: &MountEntry| mount.mount_point != path && mount.mount_point.starts_with(path);
    mounts.iter().any(is_below)
}

/// Parses the mount table (proc_pid_mountinfo(5)). Any user of the host who may mount a FUSE file system chooses a
/// mount point, which need not be UTF-8.
fn parse_mounts(table: &[u8]) -> Vec<MountEntry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_mount).collect()
}

fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mount_point = unescape(fields.nth(4)?);
    // Optional fields end with a hyphen. The type of the file system is next.
    fields.find(|field| *field == b"-")?;
    Some(MountEntry {
        mount_point,
        source: String::from_utf8_lossy(fields.nth(1)?).into_owned(),
    })
}

/// Replaces the escapes of the mount table: a backslash and three octal digits for one byte.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// A function that returns the kind of the file at a path. There are no mounts below any path.
#[cfg(test)]
impl<F: Fn(&Path) -> io::Result<SourceKind>> Inspect for F {
    fn kind(&self, path: &Path) -> io::Result<SourceKind> {
        self(path)
    }

    fn has_mounts_below(&self, _: &Path) -> io::Result<bool> {
        Ok(false)
    }

    fn restrictions(&self, _: &Path) -> io::Result<MountRestrictions> {
        Ok(MountRestrictions::default())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

    use super::*;

    #[test]
    fn mount_points_need_not_be_utf8() {
        let table = b"22 1 0:21 / /a\xff\\040b rw,relatime shared:2 master:1 - fuse.x user\xfe rw\n\
            23 1 0:22 / /dev/shm rw - tmpfs shm rw,size=64k\n";

        let mounts = parse_mounts(table);

        let points: Vec<_> = mounts
            .iter()
            .map(|mount| mount.mount_point.as_os_str().as_encoded_bytes())
            .collect();
        assert_eq!(points, [&b"/a\xff b"[..], b"/dev/shm"]);
        assert_eq!(mounts[1].source, "shm");
    }

    #[test]
    fn kinds_of_sources_are_recognized() {
        let inspector = HostInspector::default();
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/proc/version", &link).unwrap();
        for (path, kind) in [
            (directory.path(), SourceKind::Directory),
            (&file, SourceKind::File),
            (&socket, SourceKind::Socket),
            (&link, SourceKind::Kernel),
            (Path::new("/dev/null"), SourceKind::Character { major: 1, minor: 3 }),
        ] {
            assert_eq!(inspector.kind(path).unwrap(), kind, "{}", path.display());
        }
        let missing = inspector.kind(&directory.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn restrictions_of_a_mount_are_read() {
        let directory = tempfile::tempdir().unwrap();
        for (flags, nosuid, noexec) in [
            (MountFlags::empty(), false, false),
            (MountFlags::NOSUID, true, false),
            (MountFlags::NOEXEC | MountFlags::NODEV, false, true),
        ] {
            let restrictions = std::thread::scope(|scope| {
                // The mount is visible to this thread only, and its end unmounts it.
                let inspected = scope.spawn(|| {
                    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
                    mount("tmpfs", directory.path(), "tmpfs", flags, None).unwrap();
                    HostInspector::default().restrictions(directory.path())
                });
                inspected.join().unwrap()
            });
            assert_eq!(restrictions.unwrap(), MountRestrictions { nosuid, noexec }, "{flags:?}");
        }
    }

    #[test]
    fn mounts_below_a_directory_are_found() {
        let inspector = HostInspector::default();
        for (path, expected) in [("/", true), ("/proc/self/fd", false)] {
            assert_eq!(inspector.has_mounts_below(Path::new(path)).unwrap(), expected, "{path}");
        }
        let table = [
            "36 35 98:0 / /srv/data rw,noatime master:1 - ext4 /dev/sda rw",
            "37 36 0:40 / /srv/data/a\\040b rw - tmpfs shm rw,size=65536k",
            "38 35 0:41 / /srv/data2/x rw - tmpfs tmpfs rw",
        ];
        let inspector = HostInspector {
            mounts: table
                .iter()
                .filter_map(|line| parse_mount(line.as_bytes()))
                .collect::<Vec<_>>()
                .into(),
        };
        assert_eq!(inspector.mounts().unwrap()[1].mount_point, Path::new("/srv/data/a b"));
        assert_eq!(inspector.mounts().unwrap()[1].source, "shm");
    }
}
