//! Files in a bundle that the shim writes for the `delete` action ([`entry`](super::entry)), which may run long after
//! the shim has died:
//!
//! | file | holds |
//! |---|---|
//! | `nutshell.json` | the resources of the host that the container uses |
//! | `exit.json` | the exit of the container |
//! | `shim.pid` | the pid of the shim; only in the bundle that the shim was started for |

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    process::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

const RESOURCE_FILE: &str = "nutshell.json";
const EXIT_FILE: &str = "exit.json";
const PID_FILE: &str = "shim.pid";

/// A file in the bundle that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub(crate) struct RecordError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The resources of the host that a container uses and that would outlive the shim. The shim's children and its mount
/// namespace end with it, so they are not recorded.
///
/// The shim stores the record before it creates the resources, so that a crash in between leaves nothing unrecorded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ResourceRecord {
    /// Absolute paths of the control groups that are created for the container, parents first.
    pub(crate) cgroups: Vec<PathBuf>,
}

impl ResourceRecord {
    /// Writes the record into `bundle`. An earlier one is replaced atomically.
    pub(crate) fn store(&self, bundle: &Path) -> Result<(), RecordError> {
        store(bundle, RESOURCE_FILE, self)
    }

    /// Reads the record in `bundle`. `None` if it does not exist.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>, RecordError> {
        load(bundle, RESOURCE_FILE)
    }
}

/// The exit of a container's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// The pid of the process on the host.
    pub(crate) pid: u32,
    /// 0 to 255.
    pub(crate) status: u32,
    /// Nanoseconds since the epoch.
    exited_at: u64,
}

impl ExitRecord {
    /// The exit with `status` of the process with host pid `pid`.
    pub(crate) fn new(pid: u32, status: u32, exited_at: SystemTime) -> Self {
        let since_epoch = exited_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            pid,
            status,
            exited_at: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    pub(crate) fn exited_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.exited_at)
    }

    /// Writes the record into `bundle`.
    pub(crate) fn store(&self, bundle: &Path) -> Result<(), RecordError> {
        store(bundle, EXIT_FILE, self)
    }

    /// Reads the record in `bundle`. `None` if it does not exist.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>, RecordError> {
        load(bundle, EXIT_FILE)
    }
}

/// The shim's `shim.pid`. The shim holds a lock on it until it exits: while the lock is held, the pid in the file is
/// not reused by another process.
#[derive(Debug)]
pub(crate) struct PidFile(File);

impl PidFile {
    /// Creates and locks the file in `bundle`. Fails if another process holds the lock.
    pub(crate) fn create(bundle: &Path) -> Result<Self, RecordError> {
        let path = bundle.join(PID_FILE);
        let create = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            file.set_len(0)?;
            Ok(file)
        };
        create().map(Self).map_err(|source| RecordError {
            action: "create and lock",
            path,
            source,
        })
    }

    /// Duplicates the descriptor for the shim. The duplicate shares the lock.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        self.0.try_clone().map(OwnedFd::from)
    }

    /// Writes the pid of the shim, which inherits the lock.
    pub(crate) fn write(&self, pid: u32) -> io::Result<()> {
        self.0.write_all_at(format!("{pid}\n").as_bytes(), 0)
    }

    /// Links the pid file of `bundle` into the bundle `other`, so that it survives the removal of `bundle`. A lock
    /// belongs to the file, not to its name.
    pub(crate) fn link(bundle: &Path, other: &Path) -> Result<(), RecordError> {
        let path = other.join(PID_FILE);
        match fs::hard_link(bundle.join(PID_FILE), &path) {
            Err(source) if source.kind() != ErrorKind::AlreadyExists => Err(RecordError {
                action: "link the pid file to",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }
}

/// Whether the shim of a bundle is alive.
#[derive(Debug)]
pub(crate) enum ShimStatus {
    /// The bundle has no pid file: the shim was started for another container, or never.
    NoPidFile,
    /// It has died.
    Dead,
    /// It is alive. `None` until its pid is written.
    Alive(Option<Pid>),
}

impl ShimStatus {
    /// Reads the pid file in `bundle` and tests its lock.
    pub(crate) fn read(bundle: &Path) -> Result<Self, RecordError> {
        let path = bundle.join(PID_FILE);
        let read = || {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::NoPidFile),
                Err(error) => return Err(error),
            };
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(Self::Dead),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
            let pid = io::read_to_string(file)?.trim().parse().ok().and_then(Pid::from_raw);
            Ok(Self::Alive(pid))
        };
        read().map_err(|source| RecordError {
            action: "read",
            path: path.clone(),
            source,
        })
    }
}

fn store(bundle: &Path, name: &str, value: &impl Serialize) -> Result<(), RecordError> {
    let path = bundle.join(name);
    let temporary = bundle.join(format!(".{name}"));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|source| RecordError {
        action: "write",
        path: path.clone(),
        source,
    })
}

fn load<T: DeserializeOwned>(bundle: &Path, name: &str) -> Result<Option<T>, RecordError> {
    let failed = |path, source| RecordError {
        action: "read",
        path,
        source,
    };
    let path = bundle.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(path, source)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| failed(path, error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_records_are_loaded_and_missing_ones_are_none() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(ResourceRecord::load(bundle.path()).unwrap(), None);
        assert_eq!(ExitRecord::load(bundle.path()).unwrap(), None);
        let record = ResourceRecord {
            cgroups: vec!["/sys/fs/cgroup/x".into()],
        };
        record.store(bundle.path()).unwrap();
        assert_eq!(ResourceRecord::load(bundle.path()).unwrap(), Some(record));
        let at = SystemTime::UNIX_EPOCH + Duration::new(7, 9);
        let exit = ExitRecord::new(41, 137, at);
        exit.store(bundle.path()).unwrap();
        let loaded = ExitRecord::load(bundle.path()).unwrap().unwrap();
        assert_eq!((loaded, loaded.exited_at()), (exit, at));
    }

    #[test]
    fn truncated_record_is_an_error_that_names_the_file() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join(RESOURCE_FILE), "{\"cgroups\": [").unwrap();
        let error = ResourceRecord::load(bundle.path()).unwrap_err();
        assert!(error.to_string().contains(RESOURCE_FILE), "{error}");
    }

    #[test]
    fn pid_file_lock_shows_whether_the_shim_is_alive() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(matches!(
            ShimStatus::read(bundle.path()).unwrap(),
            ShimStatus::NoPidFile
        ));
        let pid_file = PidFile::create(bundle.path()).unwrap();
        assert!(matches!(
            ShimStatus::read(bundle.path()).unwrap(),
            ShimStatus::Alive(None)
        ));
        assert!(PidFile::create(bundle.path()).is_err());
        pid_file.write(4141).unwrap();
        let shared = pid_file.share().unwrap();
        drop(pid_file);
        assert!(
            matches!(ShimStatus::read(bundle.path()).unwrap(), ShimStatus::Alive(Some(pid)) if pid.as_raw_pid() == 4141)
        );
        drop(shared);
        // Wait: a process that another test has forked shares the lock until its exec.
        flock(
            File::open(bundle.path().join(PID_FILE)).unwrap(),
            FlockOperation::LockShared,
        )
        .unwrap();
        assert!(matches!(ShimStatus::read(bundle.path()).unwrap(), ShimStatus::Dead));
    }

    #[test]
    fn linked_pid_file_has_the_same_lock() {
        let (bundle, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pid_file = PidFile::create(bundle.path()).unwrap();
        pid_file.write(4141).unwrap();
        PidFile::link(bundle.path(), other.path()).unwrap();
        PidFile::link(bundle.path(), other.path()).unwrap();
        bundle.close().unwrap();
        assert!(matches!(
            ShimStatus::read(other.path()).unwrap(),
            ShimStatus::Alive(Some(_))
        ));
    }
}
