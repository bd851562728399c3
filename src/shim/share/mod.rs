//! The pod's file server as the shim sees it: starts the process ([`crate::fs`]) and mounts what is
//! shared into its tree.
//!
//! The tree is a small tmpfs, the root of a mount namespace of its own. Mounts are made detached and
//! moved there, so that they show in no other namespace, and are gone with the last holder of the
//! namespace: the file server and the shim. The file server sees the tmpfs read-only, and no path is
//! ever resolved below a mount that a guest can write: targets lie in the tmpfs itself
//! (`RESOLVE_NO_XDEV`).

mod idmap;
mod rootfs;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
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
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use crate::{
    fs::{OWNED_BY_GUEST, ROLE},
    jail::{self, FailedStep, root::Access, step, syscalls::mount_setattr},
    oci::{HostMount, Share},
};

/// What goes wrong with shared directories.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// There is no file server.
    #[error("start the file server: {step}: {source}")]
    Start {
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A directory or file cannot be shared.
    #[error("share {} with the machine as {path}: {step}: {source}", what.display())]
    Attach {
        /// The directory or file on the host.
        what: PathBuf,
        /// Where in the tree.
        path: String,
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A mount of the snapshotter cannot be made.
    #[error("mount the root file system: {kind} from {from} at {at} with {options:?}: {source}")]
    Rootfs {
        /// The mount's type.
        kind: String,
        /// Its source.
        from: String,
        /// Its place.
        at: String,
        /// Its options.
        options: Vec<String>,
        /// Why.
        source: io::Error,
    },
    /// What was shared cannot be taken away.
    #[error("stop sharing {path}: {source}")]
    Detach {
        /// Where in the tree.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel gives no thread.
    #[error("start a thread for mounts: {0}")]
    Thread(#[source] io::Error),
}

/// A pod's file server and its tree. Dropping it does not end the process: that ends when the vmm
/// closes the connection, when the thread that started it ends, or when it is killed.
#[derive(Debug)]
pub(crate) struct FileServer {
    child: Child,
    namespace: OwnedFd,
    /// The tree's tmpfs, as a mount that can be written and that nobody else has.
    tree: OwnedFd,
    /// The tree as it is mounted in the namespace.
    root: OwnedFd,
}

impl FileServer {
    /// Starts the file server with an empty tree, and returns the socket by which the vmm reaches
    /// it. To be called on a thread that lives as long as the shim.
    pub(crate) fn spawn() -> Result<(Self, OwnedFd), ShareError> {
        let Prepared {
            namespace,
            tree,
            root,
            listener,
            connection,
        } = in_thread(|| prepare().map_err(|(step, source)| ShareError::Start { step, source }))?;
        let start = |(step, source)| ShareError::Start { step, source };
        let inherited = namespace
            .try_clone()
            .map_err(step("duplicate the namespace"))
            .map_err(start)?;
        let child = jail::build_command(ROLE)
            .stdin(OwnedFd::from(listener))
            .stdout(inherited)
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(step("execute /proc/self/exe"))
            .map_err(start)?;
        let process = Self {
            child,
            namespace,
            tree,
            root,
        };
        Ok((process, connection.into()))
    }

    /// The process, for whoever waits for its end.
    pub(crate) fn child(&self) -> &Child {
        &self.child
    }

    /// Shares a container's root file system as `path`: what `mounts` make, in their order, with
    /// `bundle_rootfs` as their place; or, where there are none, `directory` and everything mounted
    /// below it.
    pub(crate) fn attach_rootfs(
        &self,
        mounts: &[HostMount],
        directory: Option<&Path>,
        bundle_rootfs: &Path,
        path: &str,
        read_only: bool,
    ) -> Result<(), ShareError> {
        let directory = directory.filter(|_| mounts.is_empty());
        let failed = attach_error(directory.unwrap_or(bundle_rootfs), path);
        in_thread(|| {
            let mount = match directory {
                Some(directory) => clone_tree(directory, true).map_err(step("open it")).map_err(&failed)?,
                None => rootfs::mount_detached(mounts, bundle_rootfs)?,
            };
            // What a snapshotter mounts is this container's; a directory may be anybody's.
            let owned = directory.is_none();
            self.attach_detached(&mount, path, owned, read_only).map_err(&failed)
        })
    }

    /// Shares a directory or a file of the host.
    pub(crate) fn attach(&self, share: &Share) -> Result<(), ShareError> {
        in_thread(|| {
            clone_tree(&share.source, share.recursive)
                .map_err(step("open it"))
                .and_then(|mount| match &share.id_map {
                    None => Ok(mount),
                    Some(ids) => idmap::apply(mount.as_fd(), &ids.map, ids.recursive)
                        .map(|()| mount)
                        .map_err(step(idmap::STEP)),
                })
                .and_then(|mount| self.attach_detached(&mount, &share.path, false, share.read_only))
                .map_err(attach_error(&share.source, &share.path))
        })
    }

    /// Stops sharing `path` and all that is shared below it. What the guest still knows of it stays
    /// mounted, unseen, until the guest looks the path up again and finds nothing.
    pub(crate) fn detach(&self, path: &str) -> Result<(), ShareError> {
        in_thread(|| {
            relative(path)
                .and_then(|path| {
                    self.enter()?;
                    self.remove(&path)
                })
                .map_err(|source| ShareError::Detach {
                    path: path.to_owned(),
                    source,
                })
        })
    }

    /// Moves the detached `mount` to `path` of the tree. The calling thread ends up in the file
    /// server's mount namespace.
    fn attach_detached(&self, mount: &OwnedFd, path: &str, owned: bool, read_only: bool) -> Result<(), FailedStep> {
        let path = relative(path).map_err(step("check its path"))?;
        restrict(mount.as_fd(), read_only).map_err(step("set its mount options"))?;
        let is_directory = is_directory(rustix::fs::fstat(mount).map_err(step("look at it"))?);
        self.make_place(&path, is_directory, owned)
            .map_err(step("make a place for it"))?;
        self.enter().map_err(step("enter the file server's namespace"))?;
        self.open_place(&path)
            .and_then(|place| {
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
                Ok(rustix::mount::move_mount(mount, "", &place, "", flags)?)
            })
            .map_err(step("mount it"))
    }

    /// Makes what `path` will be mounted on, and the directories above it.
    fn make_place(&self, path: &Path, is_directory: bool, owned: bool) -> io::Result<()> {
        let mode = Mode::from_raw_mode(0o755);
        let above: Vec<_> = path
            .ancestors()
            .skip(1)
            .filter(|above| *above != Path::new(""))
            .collect();
        for directory in above.into_iter().rev() {
            existing_is_fine(rustix::fs::mkdirat(&self.tree, directory, mode))?;
            if owned {
                let mode = mode | Mode::from_raw_mode(OWNED_BY_GUEST);
                rustix::fs::chmodat(&self.tree, directory, mode, AtFlags::empty())?;
            }
        }
        if is_directory {
            existing_is_fine(rustix::fs::mkdirat(&self.tree, path, mode))
        } else {
            let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.tree, path, flags, Mode::from_raw_mode(0o644))?;
            Ok(())
        }
    }

    fn open_place(&self, path: &Path) -> io::Result<OwnedFd> {
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

    /// Takes the calling thread into the file server's mount namespace.
    fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        Ok(setns(&self.namespace, CloneFlags::CLONE_NEWNS)?)
    }

    /// Unmounts and removes `path` and everything below it. Looks at the tmpfs only: mounts are not
    /// in the way there.
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

struct Prepared {
    namespace: OwnedFd,
    tree: OwnedFd,
    root: OwnedFd,
    listener: UnixListener,
    connection: UnixStream,
}

/// Makes the namespace, with the calling thread in it.
fn prepare() -> Result<Prepared, FailedStep> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unshare mounts"))?;
    let namespace = File::open("/proc/thread-self/ns/mnt").map_err(step("open the mount namespace"))?;
    jail::root::pivot_into_empty(Access::ReadWrite)?;
    // The server's library takes a listening socket only. This one is bound where nobody else can
    // be, and its name is gone before anybody could.
    let (listener, connection) = connected_listener().map_err(step("connect the vhost-user socket"))?;
    let tree = clone_tree(Path::new("/"), false).map_err(step("clone the tree"))?;
    let root = rustix::fs::openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(step("open the tree"))?;
    mount_setattr(
        root.as_fd(),
        MountAttrFlags::MOUNT_ATTR_RDONLY,
        MountPropagationFlags::empty(),
        false,
    )
    .map_err(step("make the tree read-only"))?;
    Ok(Prepared {
        namespace: namespace.into(),
        tree,
        root,
        listener,
        connection,
    })
}

fn connected_listener() -> io::Result<(UnixListener, UnixStream)> {
    const NAME: &str = "/vhost-user";
    let listener = UnixListener::bind(NAME)?;
    let connection = UnixStream::connect(NAME)?;
    std::fs::remove_file(NAME)?;
    Ok((listener, connection))
}

/// A detached copy of the mount at `path`, with the mounts below it if `recursive`.
fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// What the host's side allows: nothing of it is ever executed here, and a device node that the
/// guest makes must not open a device of the host.
fn restrict(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let mut attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    mount_setattr(mount, attributes, MountPropagationFlags::PRIVATE, true)
}

/// Runs `work` on a thread of its own, which may change its namespace and directory.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T, ShareError> + Send) -> Result<T, ShareError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("mount".to_owned())
            .spawn_scoped(scope, work)
            .map_err(ShareError::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A path of the tree: names only.
fn relative(path: &str) -> io::Result<PathBuf> {
    let path = Path::new(path);
    if path.components().all(|part| matches!(part, Component::Normal(_))) && path != Path::new("") {
        Ok(path.to_owned())
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

fn existing_is_fine(made: rustix::io::Result<()>) -> io::Result<()> {
    match made {
        Err(Errno::EXIST) => Ok(()),
        made => Ok(made?),
    }
}

fn is_directory(status: Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::Directory
}

fn attach_error(what: &Path, path: &str) -> impl Fn(FailedStep) -> ShareError {
    let (what, path) = (what.to_owned(), path.to_owned());
    move |(step, source)| ShareError::Attach {
        what: what.clone(),
        path: path.clone(),
        step,
        source,
    }
}
