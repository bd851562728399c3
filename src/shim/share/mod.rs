//! The pod's file server as the shim sees it: the start of the process ([`crate::fs`]), and the tree of shared files
//! that it serves.
//!
//! The tree is a small tmpfs at the root of a mount namespace. What is shared is mounted into it. Mounts are made
//! detached and moved there, so they appear in no other namespace, and the kernel removes them with the last user of
//! the namespace: the file server or the shim. The file server sees the tmpfs read-only. Mount points lie in the tmpfs
//! itself (`RESOLVE_NO_XDEV`), so no path is resolved below a mount that a guest can write, except for a share inside
//! of another one ([`nested`]).
//!
//! Belongs here: everything that mounts on behalf of a pod. Does not belong here: serving files, which is the task of
//! the process. [`super::pod`] calls it.

mod common_shares;
mod detached;
mod error;
mod idmap;
mod in_pod;
mod layers;
mod loop_device;
mod nested;
mod rootfs;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Component, Path, PathBuf},
    process::{Child, Stdio},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags},
};

pub(crate) use self::error::ShareError;
use self::{
    common_shares::CommonShares,
    detached::{clone_mount, restrict},
    error::attach_error,
};
use crate::{
    fs::{OWNED_BY_GUEST, ROLE},
    jail::{self, FailedStep, RoleCommand, root::Access, step, syscalls::mount_setattr},
    oci::{HostFiles, ReadOnly, Share},
};

/// The step that [`restrict`] performs, in errors.
const RESTRICT_STEP: &str = "set its mount options";

/// A pod's file server and its tree. The process ends when the vmm closes the connection, when the thread that started
/// it ends, or when it is killed; dropping this does not end it.
#[derive(Debug)]
pub(crate) struct FileServer {
    child: Child,
    /// The mount namespace of the tree. The process gets the number of this descriptor, and opens it when it starts.
    namespace: OwnedFd,
    /// The tree's tmpfs as a detached, writable mount. Nothing is mounted on this one.
    tree: OwnedFd,
    /// The root of the namespace: the tmpfs, read-only, with everything that is shared.
    root: OwnedFd,
    common_shares: Mutex<CommonShares>,
}

impl FileServer {
    /// Starts the file server with an empty tree. The returned socket is the vmm's connection to it. `vmm` is a pidfd
    /// of the vmm, whose empty namespaces the file server shares. Call it on a thread that lives as long as the shim:
    /// the kernel kills the process when that thread ends.
    pub(crate) fn spawn(vmm: Option<OwnedFd>) -> Result<(Self, OwnedFd), ShareError> {
        let PreparedTree {
            namespace,
            tree,
            root,
            listener,
            connection,
        } = run_in_thread(|| prepare_tree().map_err(|(step, source)| ShareError::Start { step, source }))?;
        let start = |(step, source)| ShareError::Start { step, source };
        let child = RoleCommand::new(ROLE)
            .and_then(|mut command| {
                command
                    .arg(namespace.as_raw_fd().to_string())
                    .stdin(OwnedFd::from(listener))
                    .stdout(vmm.map_or_else(Stdio::null, Stdio::from))
                    .stderr(Stdio::piped())
                    .spawn()
            })
            .map_err(step("start the process"))
            .map_err(start)?;
        let server = Self {
            child,
            namespace,
            tree,
            root,
            common_shares: Mutex::default(),
        };
        Ok((server, connection.into()))
    }

    /// Takes the reading end of the process's standard error, which has its warnings.
    pub(crate) fn take_stderr(&mut self) -> Option<OwnedFd> {
        self.child.stderr.take().map(OwnedFd::from)
    }

    /// The process. The caller waits for its end.
    pub(crate) fn child(&self) -> &Child {
        &self.child
    }

    /// Shares a container's root file system as `path` of the tree. `bundle_rootfs` is the mount point if the files
    /// must be mounted first.
    pub(crate) fn attach_rootfs(
        &self,
        files: &HostFiles,
        bundle_rootfs: &Path,
        path: &str,
        read_only: bool,
    ) -> Result<(), ShareError> {
        run_in_thread(|| {
            let mount = mount_files(files, bundle_rootfs, path, true)?;
            // Mounts of a snapshotter belong only to this container; a directory may have other users.
            let owned_by_guest = !matches!(files, HostFiles::Directory(_));
            let read_only = if read_only { ReadOnly::All } else { ReadOnly::None };
            restrict(mount.as_fd(), read_only)
                .map_err(step(RESTRICT_STEP))
                .and_then(|()| self.attach_detached(&mount, path, owned_by_guest))
                .map_err(attach_error(source_of(files, bundle_rootfs), path))
        })
    }

    /// Shares a directory or a file of the host at its path, with its ids mapped if `share` has a map.
    pub(crate) fn attach(&self, share: &Share) -> Result<(), ShareError> {
        run_in_thread(|| {
            prepare_share(share)
                .and_then(|mount| self.attach_detached(&mount, &share.path, false))
                .map_err(attach_error(&share.source, &share.path))
        })
    }

    /// Stops sharing `path` and everything below it, and the common shares that only they use. Files that the guest has
    /// looked up stay mounted, invisibly, until the guest looks their path up again and finds nothing. A path that is not
    /// shared is not an error.
    pub(crate) fn detach(&self, path: &str) -> Result<(), ShareError> {
        // Not while the lock is held: the removal of the last mount of a file system that hangs can block.
        let unused = self.common_shares.lock().release(Path::new(path));
        run_in_thread(|| {
            parse_tree_path(path)
                .and_then(|path| {
                    self.enter()?;
                    unused.iter().chain([&path]).try_for_each(|path| self.remove(path))
                })
                .map_err(|source| ShareError::Detach {
                    path: path.to_owned(),
                    source,
                })
        })
    }

    /// Moves the detached `mount` to `path` of the tree. Leaves the calling thread in the file server's mount
    /// namespace.
    fn attach_detached(&self, mount: &OwnedFd, path: &str, owned_by_guest: bool) -> Result<(), FailedStep> {
        let path = parse_tree_path(path).map_err(step("check its path"))?;
        let is_directory = is_directory(rustix::fs::fstat(mount).map_err(step("read its type"))?);
        self.make_mount_point(&path, is_directory, owned_by_guest)
            .map_err(step("create its mount point"))?;
        self.enter().map_err(step("enter the file server's mount namespace"))?;
        self.open_mount_point(&path)
            .and_then(|mount_point| {
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
                Ok(rustix::mount::move_mount(mount, "", &mount_point, "", flags)?)
            })
            .map_err(step("mount it"))
    }

    /// Creates a directory or an empty file at `path` of the tmpfs, and its parent directories. Those get
    /// [`OWNED_BY_GUEST`] if `owned_by_guest`.
    fn make_mount_point(&self, path: &Path, is_directory: bool, owned_by_guest: bool) -> io::Result<()> {
        let mode = Mode::from_raw_mode(0o755);
        let parents: Vec<_> = path
            .ancestors()
            .skip(1)
            .filter(|parent| *parent != Path::new(""))
            .collect();
        for directory in parents.into_iter().rev() {
            ignore_existing(rustix::fs::mkdirat(&self.tree, directory, mode))?;
            if owned_by_guest {
                let mode = mode | Mode::from_raw_mode(OWNED_BY_GUEST);
                rustix::fs::chmodat(&self.tree, directory, mode, AtFlags::empty())?;
            }
        }
        if is_directory {
            ignore_existing(rustix::fs::mkdirat(&self.tree, path, mode))
        } else {
            let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.tree, path, flags, Mode::from_raw_mode(0o644))?;
            Ok(())
        }
    }

    /// Opens a path of the tmpfs in the file server's namespace.
    fn open_mount_point(&self, path: &Path) -> io::Result<OwnedFd> {
        rustix::fs::openat2(
            &self.root,
            path,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
        )
        .map_err(|error| match error {
            Errno::XDEV => io::Error::other("something is shared there already"),
            error => error.into(),
        })
    }

    /// Moves the calling thread into the file server's mount namespace.
    fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        Ok(setns(&self.namespace, CloneFlags::CLONE_NEWNS)?)
    }

    /// Unmounts and removes `path` and everything below it. Walks the detached tmpfs, on which nothing is mounted.
    fn remove(&self, path: &Path) -> io::Result<()> {
        let directory = match rustix::fs::statat(&self.tree, path, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            status => is_directory(status?),
        };
        if directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(&self.tree, path, flags, Mode::empty())?;
            for entry in Dir::new(opened)? {
                let entry = entry?;
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name != "." && name != ".." {
                    self.remove(&path.join(name))?;
                }
            }
        }
        match rustix::mount::unmount(Path::new("/").join(path), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Not a mount point.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        Ok(rustix::fs::unlinkat(&self.tree, path, flags)?)
    }
}

/// Makes a detached mount of an image's root file system, in which the shim opens files. `bundle_rootfs` is the mount
/// point if the files must be mounted first. The result appears in no mount namespace, and has no device nodes.
pub(crate) fn mount_image(files: &HostFiles, bundle_rootfs: &Path) -> Result<OwnedFd, ShareError> {
    const PLACE: &str = "the files of an image";
    run_in_thread(|| {
        let mount = mount_files(files, bundle_rootfs, PLACE, false)?;
        restrict(mount.as_fd(), ReadOnly::None)
            .map_err(step(RESTRICT_STEP))
            .map_err(attach_error(source_of(files, bundle_rootfs), PLACE))?;
        Ok(mount)
    })
}

/// A detached mount of `files`. With `recursive`, it includes what is mounted below a directory. `place` names the
/// destination in errors. Leaves the calling thread in another mount namespace.
fn mount_files(files: &HostFiles, bundle_rootfs: &Path, place: &str, recursive: bool) -> Result<OwnedFd, ShareError> {
    match files {
        HostFiles::Directory(directory) => clone_mount(directory, recursive)
            .map_err(step("open it"))
            .map_err(attach_error(directory, place)),
        HostFiles::Mounts(mounts) => rootfs::mount_detached(mounts, bundle_rootfs),
        HostFiles::Overlay(overlay) => layers::mount_detached(overlay, bundle_rootfs),
    }
}

/// The path of `files` in errors.
fn source_of<'p>(files: &'p HostFiles, bundle_rootfs: &'p Path) -> &'p Path {
    match files {
        HostFiles::Directory(directory) => directory,
        HostFiles::Mounts(_) | HostFiles::Overlay(_) => bundle_rootfs,
    }
}

/// A detached mount of a share, with its id map and its options.
fn prepare_share(share: &Share) -> Result<OwnedFd, FailedStep> {
    let mount = clone_mount(&share.source, share.recursive).map_err(step("open it"))?;
    apply_options(mount.as_fd(), share)?;
    Ok(mount)
}

/// Applies the id map and the options of a share to its detached mount.
fn apply_options(mount: BorrowedFd<'_>, share: &Share) -> Result<(), FailedStep> {
    if let Some(ids) = &share.id_map {
        idmap::apply(mount, &ids.map, ids.recursive).map_err(step(idmap::ID_MAP_STEP))?;
    }
    restrict(mount, share.read_only).map_err(step(RESTRICT_STEP))
}

/// The result of [`prepare_tree`].
struct PreparedTree {
    namespace: OwnedFd,
    tree: OwnedFd,
    root: OwnedFd,
    listener: UnixListener,
    connection: UnixStream,
}

/// Makes the mount namespace and moves the calling thread into it.
fn prepare_tree() -> Result<PreparedTree, FailedStep> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unshare mounts"))?;
    let namespace = File::open("/proc/thread-self/ns/mnt").map_err(step("open the mount namespace"))?;
    jail::root::pivot_into_empty(Access::ReadWrite)?;
    // The server's library accepts only a listening socket. No other process can connect to the socket: its name is
    // removed before another process enters this namespace.
    let (listener, connection) = connected_listener().map_err(step("connect the vhost-user socket"))?;
    let tree = clone_mount(Path::new("/"), false).map_err(step("clone the mount of the tree"))?;
    let root = rustix::fs::openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(step("open the root of the tree"))?;
    mount_setattr(
        root.as_fd(),
        MountAttrFlags::MOUNT_ATTR_RDONLY,
        MountPropagationFlags::empty(),
        false,
    )
    .map_err(step("make the tree read-only"))?;
    Ok(PreparedTree {
        namespace: namespace.into(),
        tree,
        root,
        listener,
        connection,
    })
}

fn connected_listener() -> io::Result<(UnixListener, UnixStream)> {
    const SOCKET_PATH: &str = "/vhost-user";
    let listener = UnixListener::bind(SOCKET_PATH)?;
    let connection = UnixStream::connect(SOCKET_PATH)?;
    std::fs::remove_file(SOCKET_PATH)?;
    Ok((listener, connection))
}

/// Runs `work` on a new thread, which may change its mount namespace and its working directory.
fn run_in_thread<T: Send>(work: impl FnOnce() -> Result<T, ShareError> + Send) -> Result<T, ShareError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("mount".to_owned())
            .spawn_scoped(scope, work)
            .map_err(ShareError::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Checks a path of the tree: it must be relative, and without `..`.
fn parse_tree_path(path: &str) -> io::Result<PathBuf> {
    let path = Path::new(path);
    if path.components().all(|part| matches!(part, Component::Normal(_))) && path != Path::new("") {
        Ok(path.to_owned())
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

fn ignore_existing(made: rustix::io::Result<()>) -> io::Result<()> {
    match made {
        Err(Errno::EXIST) => Ok(()),
        made => Ok(made?),
    }
}

fn is_directory(status: Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::Directory
}
