//! `delete`: clean up after a container whose shim containerd lost, or is done with
//! (containerd `core/runtime/v2/README.md`, "delete").
//!
//! It may be called at any time, more than once, and with anything missing, so each step takes
//! absence for success, and a step that fails is told on standard error, which containerd logs, and
//! does not keep the next from being tried. containerd gives it 5 seconds.
//!
//! Children of a shim die with it, and so do mounts in its own mount namespace: what is left is in
//! the bundle's [`ResourceRecord`].

use std::{
    fmt::Display,
    fs,
    io::{self, ErrorKind, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    mount::{UnmountFlags, unmount},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{group::Group, socket};
use crate::oci;
use crate::shim::{
    record::{ExitRecord, ResourceRecord, ShimStatus},
    tasks::SIGKILL_STATUS,
};

/// How long a shim may take to end that has given up its socket, and so ends by itself.
const GRACE: Duration = Duration::from_millis(1500);

/// How long a killed process, or the last one of a cgroup, may take to be gone.
const DEATH: Duration = Duration::from_millis(1000);

/// Cleans up after a container, whose bundle is the current directory if none is named,
/// and prints containerd's `DeleteResponse`.
pub(crate) fn delete(bundle: Option<&Path>) -> io::Result<()> {
    let bundle = match bundle {
        Some(bundle) => bundle.to_owned(),
        None => std::env::current_dir()?,
    };
    let response = clean(&bundle);
    io::stdout().write_all(&response.write_to_bytes()?)
}

fn clean(bundle: &Path) -> DeleteResponse {
    end_shim(bundle);
    if let Some(socket) = shims_socket(bundle) {
        tell(socket::remove_stale(&socket));
    }
    let record = tell(ResourceRecord::load(bundle)).flatten().unwrap_or_default();
    // Where containerd's own mounts, or a crash, left one.
    tell(detach(&bundle.join("rootfs")));
    for cgroup in record.cgroups.iter().rev() {
        tell(remove_cgroup(cgroup));
    }
    let exit = tell(ExitRecord::load(bundle)).flatten();
    response(exit.unwrap_or_else(|| ExitRecord::new(0, SIGKILL_STATUS, SystemTime::now())))
}

/// Says what went wrong, in one line, and goes on.
fn tell<T, E: Display>(result: Result<T, E>) -> Option<T> {
    result.map_err(|error| eprintln!("delete: {error}")).ok()
}

fn response(exit: ExitRecord) -> DeleteResponse {
    let since_epoch = exit
        .exited_at()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    DeleteResponse {
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(Timestamp {
            seconds: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since_epoch.subsec_nanos()).unwrap_or(0),
            ..Timestamp::default()
        }),
        ..DeleteResponse::default()
    }
}

/// Ends the shim if this is the bundle that it was started for, and nobody else needs it.
fn end_shim(bundle: &Path) {
    let Some(ShimStatus::Alive(pid)) = tell(ShimStatus::read(bundle)) else {
        return;
    };
    if let Some(other) = other_member(bundle) {
        tell(ShimStatus::link_pid_file(bundle, &other));
        return;
    }
    match pid {
        Some(pid) => drop(tell(kill(bundle, pid))),
        None => eprintln!(
            "delete: {}: a shim holds the lock whose pid is not known yet",
            bundle.display()
        ),
    }
}

/// Another bundle whose container is in the same named group. A pod's sandbox takes its members with
/// it; of a named group the first started has no such right.
fn other_member(bundle: &Path) -> Option<PathBuf> {
    let annotations = oci::read_annotations(bundle).ok()?;
    let Some(Group::Named(_)) = Group::from_annotations(&annotations) else {
        return None;
    };
    let address = fs::read(bundle.join("address")).ok()?;
    let siblings = fs::read_dir(bundle.parent()?).ok()?.filter_map(Result::ok);
    siblings
        .map(|entry| entry.path())
        .filter(|path| path.file_name() != bundle.file_name())
        .find(|path| fs::read(path.join("address")).is_ok_and(|other| other == address))
}

/// Kills the shim: at once if it still has its socket, else after it had time to end by itself.
fn kill(bundle: &Path, pid: Pid) -> io::Result<()> {
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        // Older kernels say the second of a pid that is only a session's any more.
        Err(Errno::SRCH | Errno::INVAL) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // The lock was held when the pid was read and still is: nobody else has the pid meanwhile.
    if !matches!(ShimStatus::read(bundle), Ok(ShimStatus::Alive(_))) {
        return Ok(());
    }
    let ending = shims_socket(bundle).is_some_and(|socket| !socket.exists());
    if ending && wait(process.as_fd(), PollFlags::IN, GRACE)? {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    if wait(process.as_fd(), PollFlags::IN, DEATH)? {
        Ok(())
    } else {
        Err(io::Error::new(ErrorKind::TimedOut, format!("shim {pid} does not end")))
    }
}

/// The path in the `address` that `start` left in the bundle.
fn shims_socket(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    address.trim().strip_prefix("unix://").map(PathBuf::from)
}

/// Unmounts all that is mounted at `path`.
fn detach(path: &Path) -> io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // No mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(with_path(error, path)),
        }
    }
}

/// Kills what is left in a cgroup and removes it. Another `delete` may remove it meanwhile.
fn remove_cgroup(path: &Path) -> io::Result<()> {
    if !path.starts_with("/sys/fs/cgroup") {
        return Err(with_path(ErrorKind::InvalidInput, path));
    }
    match empty_and_remove_cgroup(path) {
        // The files of a removed cgroup that are still open fail with ENODEV (kernfs).
        Err(error) if error.kind() != ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV) => {
            Err(with_path(error, path))
        }
        _ => Ok(()),
    }
}

/// cgroup v2: `cgroup.kill`, and `cgroup.events` tells when it is empty.
fn empty_and_remove_cgroup(path: &Path) -> io::Result<()> {
    let events = fs::File::open(path.join("cgroup.events"))?;
    fs::write(path.join("cgroup.kill"), "1")?;
    let deadline = Instant::now() + DEATH;
    loop {
        // A change after this read is an event, so none between here and the wait is missed.
        events.read_at(&mut [0; 64], 0)?;
        match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                let left = deadline.saturating_duration_since(Instant::now());
                if !wait(events.as_fd(), PollFlags::PRI, left)? {
                    return Err(error);
                }
            }
            result => return result,
        }
    }
}

fn with_path(error: impl Into<io::Error>, path: &Path) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Whether the event came within `timeout`.
fn wait(fd: BorrowedFd<'_>, event: PollFlags, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).map_err(|_| ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::new(&fd, event)];
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::shim::record::PidFile;

    fn bundle(parent: &Path, id: &str, address: &str) -> PathBuf {
        let bundle = parent.join(id);
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("address"), address).unwrap();
        bundle
    }

    /// Waits until no process has a copy of the lock; one that another test forks has it until it
    /// executes.
    fn await_release(bundle: &Path) {
        let file = fs::File::open(bundle.join("shim.pid")).unwrap();
        rustix::fs::flock(file, rustix::fs::FlockOperation::LockShared).unwrap();
    }

    /// A process that holds the bundle's lock, as a shim does.
    fn shim(bundle: &Path) -> std::process::Child {
        let pid_file = PidFile::create(bundle).unwrap();
        let lock = Stdio::from(pid_file.share().unwrap());
        let shim = Command::new("sleep").arg("1000").stdout(lock).spawn().unwrap();
        pid_file.write(shim.id()).unwrap();
        shim
    }

    #[test]
    fn missing_bundle_and_empty_bundle_are_deleted_as_killed() {
        let directory = tempfile::tempdir().unwrap();
        for bundle in [Path::new("/no/such/bundle"), directory.path()] {
            for _ in 0..2 {
                let response = clean(bundle);
                assert_eq!((response.pid, response.exit_status), (0, 137));
                assert!(response.exited_at.seconds > 1_700_000_000);
            }
        }
    }

    #[test]
    fn exit_that_was_recorded_is_reported() {
        let bundle = tempfile::tempdir().unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::new(5, 6);
        ExitRecord::new(41, 3, at).store(bundle.path()).unwrap();
        let response = clean(bundle.path());
        assert_eq!((response.pid, response.exit_status), (41, 3));
        assert_eq!((response.exited_at.seconds, response.exited_at.nanos), (5, 6));
    }

    #[test]
    fn recorded_cgroups_outside_cgroupfs_are_refused_and_a_second_delete_is_no_error() {
        let bundle = tempfile::tempdir().unwrap();
        let record = ResourceRecord {
            cgroups: vec!["/sys/fs/cgroup/no-such-cgroup".into(), "/etc".into()],
        };
        record.store(bundle.path()).unwrap();
        clean(bundle.path());
        clean(bundle.path());
        assert!(Path::new("/etc").exists());
    }

    #[test]
    fn hung_shim_of_the_bundle_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        fs::write(&socket, "").unwrap();
        let bundle = bundle(directory.path(), "c1", &format!("unix://{}", socket.display()));
        let mut shim = shim(&bundle);
        clean(&bundle);
        assert!(!shim.wait().unwrap().success());
        await_release(&bundle);
        assert!(matches!(ShimStatus::read(&bundle).unwrap(), ShimStatus::Dead));
    }

    #[test]
    fn shim_of_another_bundle_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let sandbox = bundle(directory.path(), "pod", "unix:///s");
        let member = bundle(directory.path(), "c1", "unix:///s");
        let mut shim = shim(&sandbox);
        clean(&member);
        assert!(matches!(
            ShimStatus::read(&sandbox).unwrap(),
            ShimStatus::Alive(Some(_))
        ));
        shim.kill().unwrap();
        shim.wait().unwrap();
    }

    #[test]
    fn shim_of_a_named_group_lives_until_its_last_member_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/socket", directory.path().display());
        let members = ["a", "b"].map(|id| bundle(directory.path(), id, &address));
        let config = r#"{"annotations": {"io.containerd.runc.v2.group": "g"}}"#;
        for member in &members {
            fs::write(member.join("config.json"), config).unwrap();
        }
        let mut shim = shim(&members[0]);
        clean(&members[0]);
        fs::remove_dir_all(&members[0]).unwrap();
        assert!(matches!(
            ShimStatus::read(&members[1]).unwrap(),
            ShimStatus::Alive(Some(_))
        ));
        fs::write(directory.path().join("socket"), "").unwrap();
        clean(&members[1]);
        assert!(!shim.wait().unwrap().success());
    }

    #[test]
    fn stale_pid_file_kills_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid_file = PidFile::create(directory.path()).unwrap();
        pid_file.write(bystander.id()).unwrap();
        drop(pid_file);
        await_release(directory.path());
        clean(directory.path());
        assert!(bystander.try_wait().unwrap().is_none());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }
}
