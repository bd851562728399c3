//! The shim's socket: its name, and who may make it.
//!
//! Two `start`s for one group may run at once, and a socket may be left over from a shim that was
//! killed. All of "look, unlink, bind, listen" happens under a lock on the socket's directory, which
//! leaves no lock file behind.

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

/// Where sockets are unless `socket_dir` says otherwise (containerd `pkg/shim/util_unix.go`).
const DEFAULT_DIRECTORY: &str = "/run/containerd/s";

/// As many connections as may wait for the shim to start: one for each member of a pod.
const BACKLOG: i32 = 4096;

/// What is wrong with a socket.
#[derive(Debug, thiserror::Error)]
#[error("{} socket {}: {source}", doing, path.display())]
pub(crate) struct SocketError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The socket's state after [`acquire`].
#[derive(Debug)]
pub(crate) enum Acquired {
    /// Bound and listening, nobody accepts yet.
    New(OwnedFd),
    /// Somebody listens already.
    Existing,
}

/// The path for the shim that serves `group`, a container's or sandbox's id.
///
/// Only a hash is in the name: a path in `sockaddr_un` has 108 bytes, and namespaces and ids may have
/// 76 each.
pub(crate) fn path(directory: Option<&Path>, containerd: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Sha256::digest(format!("{containerd}/{namespace}/{group}"));
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    directory.unwrap_or(Path::new(DEFAULT_DIRECTORY)).join(name)
}

/// Binds the socket at `path` unless a shim listens there.
pub(crate) fn acquire(path: &Path) -> Result<Acquired, SocketError> {
    let fail = |doing| {
        move |source: io::Error| SocketError {
            doing,
            path: path.to_owned(),
            source,
        }
    };
    let _lock = lock(path, true).map_err(fail("lock the directory of"))?;
    match probe(path).map_err(fail("connect to"))? {
        Probe::Alive => return Ok(Acquired::Existing),
        Probe::Stale => std::fs::remove_file(path).map_err(fail("remove stale"))?,
        Probe::Missing => {}
    }
    bound(path).map(Acquired::New).map_err(fail("bind"))
}

/// Removes the socket at `path` if nobody listens there any more. Nothing there is no error.
pub(crate) fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let fail = |source| SocketError {
        doing: "remove stale",
        path: path.to_owned(),
        source,
    };
    let _lock = match lock(path, false) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    match probe(path).map_err(fail)? {
        Probe::Stale => std::fs::remove_file(path).map_err(fail),
        Probe::Alive | Probe::Missing => Ok(()),
    }
}

/// A lock on the directory that `path` is in; it ends when the file is closed.
fn lock(path: &Path, create: bool) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if create {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let directory = File::open(directory)?;
    flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

enum Probe {
    Alive,
    Stale,
    Missing,
}

fn probe(path: &Path) -> io::Result<Probe> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        // Too many wait to be accepted: it is slow, not gone.
        Ok(()) | Err(Errno::AGAIN) => Ok(Probe::Alive),
        Err(Errno::CONNREFUSED) => Ok(Probe::Stale),
        Err(Errno::NOENT) => Ok(Probe::Missing),
        Err(error) => Err(error.into()),
    }
}

fn bound(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before the socket listens.
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

    /// Waits until the last copy of a listener is closed: a process that another test forks has one
    /// until it executes.
    fn await_close(path: &Path) {
        while let Ok(mut connection) = UnixStream::connect(path) {
            // The end comes when the listener, which accepts nobody, is closed.
            let _ = connection.read(&mut [0]);
        }
    }

    #[test]
    fn name_fits_a_socket_address_for_the_longest_namespace_and_id_and_tells_all_apart() {
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
    fn first_binds_for_root_only_and_second_finds_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");
        let Acquired::New(_listener) = acquire(&path).unwrap() else {
            panic!("nobody listens yet");
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
    fn socket_that_nobody_serves_is_replaced_or_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let Acquired::New(listener) = acquire(&path).unwrap() else {
            panic!("nobody listens yet");
        };
        remove_stale(&path).unwrap();
        assert!(path.exists());
        drop(listener);
        await_close(&path);
        let Acquired::New(listener) = acquire(&path).unwrap() else {
            panic!("nobody listens any more");
        };
        drop(listener);
        await_close(&path);
        remove_stale(&path).unwrap();
        assert!(!path.exists());
        remove_stale(&path).unwrap();
        remove_stale(Path::new("/no/such/directory/socket")).unwrap();
    }

    #[test]
    fn of_many_at_once_one_binds() {
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
