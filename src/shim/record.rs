//! What is written into a container's bundle for [`crate::shim::delete`], which may run long after the shim
//! has died: `nutshell.json`, what the host holds for the container; `exit.json`, how it ended; and
//! `shim.pid`, which only the shim's own bundle has.

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

const RECORD: &str = "nutshell.json";
const EXIT: &str = "exit.json";
const PID: &str = "shim.pid";

/// Why a file of the bundle cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(crate) struct RecordError {
    path: PathBuf,
    source: io::Error,
}

/// What the host holds for a container, and would outlive the shim.
///
/// The shim stores it in the container's own bundle before it makes what it names, so that a crash in
/// between leaves nothing unnamed. What ends with the shim need not be here: its children, its mount
/// namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ResourceRecord {
    /// Control groups that were made for it, absolute paths, parents first.
    pub(crate) cgroups: Vec<PathBuf>,
}

impl ResourceRecord {
    /// Writes the record into `bundle`, replacing an earlier one as a whole.
    pub(crate) fn store(&self, bundle: &Path) -> Result<(), RecordError> {
        store(bundle, RECORD, self)
    }

    /// The record in `bundle`, if there is one.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>, RecordError> {
        load(bundle, RECORD)
    }
}

/// How a container's first process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// The host pid that stood for it.
    pub(crate) pid: u32,
    /// 0–255.
    pub(crate) status: u32,
    /// Nanoseconds since the epoch.
    exited_at: u64,
}

impl ExitRecord {
    /// The end of the process with host pid `pid` at `exited_at`.
    pub(crate) fn new(pid: u32, status: u32, exited_at: SystemTime) -> Self {
        let since_epoch = exited_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            pid,
            status,
            exited_at: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// When it ended.
    pub(crate) fn exited_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.exited_at)
    }

    /// Writes it into `bundle`.
    pub(crate) fn store(&self, bundle: &Path) -> Result<(), RecordError> {
        store(bundle, EXIT, self)
    }

    /// What `bundle` says, if anything.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>, RecordError> {
        load(bundle, EXIT)
    }
}

/// The shim's `shim.pid`: its pid, locked for as long as the shim lives. Whoever cannot take the lock
/// knows that the pid is not another process's by now.
#[derive(Debug)]
pub(crate) struct PidFile(File);

impl PidFile {
    /// Makes and locks the file in `bundle`.
    pub(crate) fn create(bundle: &Path) -> Result<Self, RecordError> {
        let path = bundle.join(PID);
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
        create().map(Self).map_err(|source| RecordError { path, source })
    }

    /// A descriptor that holds the lock too, to pass to the shim.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        self.0.try_clone().map(OwnedFd::from)
    }

    /// Says whose lock it is.
    pub(crate) fn write(&self, pid: u32) -> io::Result<()> {
        self.0.write_all_at(format!("{pid}\n").as_bytes(), 0)
    }
}

/// Who `shim.pid` of a bundle speaks of.
#[derive(Debug)]
pub(crate) enum ShimStatus {
    /// There is no such file: the shim was started for another container, or never.
    NoPidFile,
    /// It has died.
    Dead,
    /// It lives; `None` if it was started this moment and its pid is not written yet.
    Alive(Option<Pid>),
}

impl ShimStatus {
    /// Looks at `bundle`.
    pub(crate) fn read(bundle: &Path) -> Result<Self, RecordError> {
        let path = bundle.join(PID);
        let look = || {
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
        look().map_err(|source| RecordError {
            path: path.clone(),
            source,
        })
    }

    /// Lets the bundle `other` speak for the shim of `bundle` as well: the lock is the file's, not the
    /// name's.
    pub(crate) fn hand_over(bundle: &Path, other: &Path) -> Result<(), RecordError> {
        let path = other.join(PID);
        match fs::hard_link(bundle.join(PID), &path) {
            Err(source) if source.kind() != ErrorKind::AlreadyExists => Err(RecordError { path, source }),
            _ => Ok(()),
        }
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
        path: path.clone(),
        source,
    })
}

fn load<T: DeserializeOwned>(bundle: &Path, name: &str) -> Result<Option<T>, RecordError> {
    let path = bundle.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RecordError { path, source }),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| RecordError {
        path,
        source: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_and_absence_is_no_error() {
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
    fn torn_record_is_an_error_that_names_it() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join(RECORD), "{\"cgroups\": [").unwrap();
        let error = ResourceRecord::load(bundle.path()).unwrap_err();
        assert!(error.to_string().contains(RECORD), "{error}");
    }

    #[test]
    fn lock_of_the_pid_file_tells_the_living_from_the_dead() {
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
        // A process that another test forks has a copy of the lock until it executes.
        flock(File::open(bundle.path().join(PID)).unwrap(), FlockOperation::LockShared).unwrap();
        assert!(matches!(ShimStatus::read(bundle.path()).unwrap(), ShimStatus::Dead));
    }

    #[test]
    fn handed_over_pid_file_is_the_same_lock() {
        let (bundle, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pid_file = PidFile::create(bundle.path()).unwrap();
        pid_file.write(4141).unwrap();
        ShimStatus::hand_over(bundle.path(), other.path()).unwrap();
        ShimStatus::hand_over(bundle.path(), other.path()).unwrap();
        bundle.close().unwrap();
        assert!(matches!(
            ShimStatus::read(other.path()).unwrap(),
            ShimStatus::Alive(Some(_))
        ));
    }
}
