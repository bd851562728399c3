//! The shim's socket: its path, creation and removal.
//!
//! Two `start` actions for one group may run at the same time, and a killed shim leaves its socket behind. So the
//! socket is probed, unlinked and bound under a lock on its directory, which needs no lock file.

use std::{
    fs::{DirBuilder, File, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};
use sha2::{Digest, Sha256};

/// The directory of sockets unless the request has a `socket_dir` (containerd `pkg/shim/util_unix.go`).
const DEFAULT_DIRECTORY: &str = "/run/containerd/s";

/// Maximum number of connections that the shim has not accepted yet: one for each container of a pod.
const BACKLOG: i32 = 4096;

/// A socket that cannot be created or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} socket {}: {source}", path.display())]
pub(crate) struct SocketError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The result of [`acquire`].
#[derive(Debug)]
pub(crate) enum Acquired {
    /// A new listening socket. No process accepts its connections yet.
    New(OwnedFd),
    /// A shim is already listening.
    Existing,
}

/// The path of the socket for the shim of `group`, which is the id of a container or sandbox or a group's name.
/// `address` is containerd's.
///
/// The file name is a hash, because a path in `sockaddr_un` has at most 108 bytes, and namespace and id may have 76
/// each.
pub(crate) fn path(directory: Option<&Path>, address: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Sha256::digest(format!("{address}/{namespace}/{group}"));
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    directory.unwrap_or(Path::new(DEFAULT_DIRECTORY)).join(name)
}

/// Binds the socket at `path` unless a shim listens there.
pub(crate) fn acquire(path: &Path) -> Result<Acquired, SocketError> {
    let fail = |action| {
        move |source: io::Error| SocketError {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let _lock = lock_directory(path, true).map_err(fail("lock the directory of"))?;
    match probe(path).map_err(fail("connect to"))? {
        Probe::Alive => return Ok(Acquired::Existing),
        Probe::Stale => std::fs::remove_file(path).map_err(fail("remove stale"))?,
        Probe::Missing => {}
    }
    bind_and_listen(path).map(Acquired::New).map_err(fail("bind"))
}

/// Removes the socket at `path` unless a shim listens there. No-op if it does not exist.
pub(crate) fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let fail = |source| SocketError {
        action: "remove stale",
        path: path.to_owned(),
        source,
    };
    let _lock = match lock_directory(path, false) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    match probe(path).map_err(fail)? {
        Probe::Stale => std::fs::remove_file(path).map_err(fail),
        Probe::Alive | Probe::Missing => Ok(()),
    }
}

/// Locks the directory of `path` until the returned file is closed. Creates the directory if `create`.
fn lock_directory(path: &Path, create: bool) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if create {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let directory = File::open(directory)?;
    flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

/// The state of a socket's path.
enum Probe {
    /// A process listens.
    Alive,
    /// The file exists and no process listens.
    Stale,
    Missing,
}

fn probe(path: &Path) -> io::Result<Probe> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        // EAGAIN: the backlog is full, so the shim is slow but alive.
        Ok(()) | Err(Errno::AGAIN) => Ok(Probe::Alive),
        Err(Errno::CONNREFUSED) => Ok(Probe::Stale),
        Err(Errno::NOENT) => Ok(Probe::Missing),
        Err(error) => Err(error.into()),
    }
}

fn bind_and_listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Early enough, because no client can connect before `listen`.
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        os::unix::{fs::FileTypeExt, net::UnixStream},
    };

    use super::*;

    /// Waits until the last copy of a listener is closed. A process that another test forks has a copy until its exec.
    fn await_close(path: &Path) {
        while let Ok(mut connection) = UnixStream::connect(path) {
            // Returns when the listener, which accepts no connection, is closed.
            let _ = connection.read(&mut [0]);
        }
    }

    #[test]
    fn path_is_unique_and_fits_a_socket_address_for_the_longest_namespace_and_id() {
        let long = "n".repeat(76);
        let longest_directory = "/".to_owned() + &"d".repeat(41);
        let path_of = |namespace, group| path(None, "/run/containerd/containerd.sock", namespace, group);
        let longest = path(Some(Path::new(&longest_directory)), &long, &long, &long);
        assert!(SocketAddrUnix::new(&longest).is_ok(), "{}", longest.display());
        assert_eq!(
            path_of(&long, &long).as_os_str().len(),
            DEFAULT_DIRECTORY.len() + 1 + 64
        );
        assert_eq!(path_of("default", "a"), path_of("default", "a"));
        assert_ne!(path_of("default", "a"), path_of("default", "b"));
        assert_ne!(path_of("default", "a"), path_of("k8s.io", "a"));
        assert_ne!(path_of("default", "a"), path(None, "/other.sock", "default", "a"));
    }

    #[test]
    fn first_call_binds_for_root_only_and_second_finds_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");
        let Acquired::New(_listener) = acquire(&path).unwrap() else {
            panic!("a process listens");
        };
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        let parent = std::fs::metadata(path.parent().unwrap()).unwrap();
        assert_eq!(parent.permissions().mode() & 0o777, 0o700);
        assert!(matches!(acquire(&path).unwrap(), Acquired::Existing));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn stale_socket_is_replaced_or_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let Acquired::New(listener) = acquire(&path).unwrap() else {
            panic!("a process listens");
        };
        remove_stale(&path).unwrap();
        assert!(path.exists());
        drop(listener);
        await_close(&path);
        let Acquired::New(listener) = acquire(&path).unwrap() else {
            panic!("a process still listens");
        };
        drop(listener);
        await_close(&path);
        remove_stale(&path).unwrap();
        assert!(!path.exists());
        remove_stale(&path).unwrap();
        remove_stale(Path::new("/no/such/directory/socket")).unwrap();
    }

    #[test]
    fn one_of_many_concurrent_calls_binds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let acquired: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| acquire(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let new = acquired
            .iter()
            .filter(|acquired| matches!(acquired, Acquired::New(_)))
            .count();
        assert_eq!(new, 1);
    }
}
