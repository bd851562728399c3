//! `delete`: cleans up after a container whose shim has died, hangs or has finished (containerd
//! `core/runtime/v2/README.md`, "delete").
//!
//! containerd may call it at any time and repeatedly, and gives it 5 seconds. So a step that finds nothing to do
//! succeeds, and a step that fails is reported on standard error, which containerd logs, and does not stop the next
//! one.
//!
//! The jailed children and the pid holders of a shim, and the mounts of its mount namespace, end with it. All other
//! resources are in the bundle's [`ResourceRecord`].

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
    protobuf::{Message, MessageField},
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
    pod::{is_left_behind, leave_behind},
    record::{ExitRecord, PidFile, ResourceRecord, ShimStatus},
    tasks::SIGKILL_STATUS,
};

/// How long a shim may take to exit after it has removed its socket, before it is killed.
const SHUTDOWN_LIMIT: Duration = Duration::from_millis(1500);

/// How long a killed process may take to exit.
const AFTER_KILL_LIMIT: Duration = Duration::from_millis(1000);

/// How long after the start of `delete` it waits at most for killed cgroups to become empty.
const CGROUP_LIMIT: Duration = Duration::from_millis(4000);

/// How long it waits for a cgroup with processes that did not end when the shim killed them.
const LEFT_BEHIND_LIMIT: Duration = Duration::from_millis(200);

/// Cleans up after the container of `bundle`, by default the current directory, and prints containerd's
/// `DeleteResponse`.
pub(crate) fn delete(bundle: Option<&Path>) -> io::Result<()> {
    let bundle = match bundle {
        Some(bundle) => bundle.to_owned(),
        None => std::env::current_dir().map_err(|error| with_step(error, "find the bundle"))?,
    };
    let response = clean_up(&bundle);
    io::stdout()
        .write_all(&response.write_to_bytes()?)
        .map_err(|error| with_step(error, "print the DeleteResponse"))
}

fn clean_up(bundle: &Path) -> DeleteResponse {
    let deadline = Instant::now() + CGROUP_LIMIT;
    end_shim(bundle);
    if let Some(socket) = shim_socket(bundle) {
        report(socket::remove_stale(&socket));
    }
    let record = report(ResourceRecord::load(bundle)).flatten().unwrap_or_default();
    // containerd or a crash may have left a mount there.
    report(unmount_all(&bundle.join("rootfs")));
    for cgroup in record.cgroups.iter().rev() {
        report(remove_cgroup(cgroup, deadline));
    }
    let exit = report(ExitRecord::load(bundle)).flatten();
    to_response(exit.unwrap_or_else(|| ExitRecord::new(0, SIGKILL_STATUS, SystemTime::now())))
}

/// Returns the value, or prints the error as one line.
fn report<T, E: Display>(result: Result<T, E>) -> Option<T> {
    result.map_err(|error| eprintln!("delete: {error}")).ok()
}

fn to_response(exit: ExitRecord) -> DeleteResponse {
    DeleteResponse {
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(exit.exited_at().into()),
        ..DeleteResponse::default()
    }
}

/// Ends the shim if it was started for this bundle and serves no other container of a named group.
fn end_shim(bundle: &Path) {
    let Some(ShimStatus::Alive(pid)) = report(ShimStatus::read(bundle)) else {
        return;
    };
    if let Some(other) = find_other_member(bundle) {
        report(PidFile::link(bundle, &other));
        return;
    }
    match pid {
        Some(pid) => {
            let step = format!("kill shim {}", pid.as_raw_nonzero());
            report(kill_shim(bundle, pid).map_err(|error| with_step(error, &step)));
        }
        None => eprintln!(
            "delete: {}: the shim is not ended, because it is starting and its pid is not known yet: run delete again",
            bundle.display()
        ),
    }
}

/// Finds another bundle of the same named group. The shim must outlive the container that it was started for if others
/// of the group remain. In a pod it need not, because the end of the sandbox ends all containers.
fn find_other_member(bundle: &Path) -> Option<PathBuf> {
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

/// Kills the shim. If it has removed its socket, it is about to exit, and has [`SHUTDOWN_LIMIT`] for that.
fn kill_shim(bundle: &Path, pid: Pid) -> io::Result<()> {
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        // Older kernels return EINVAL for a pid that only a session still uses.
        Err(Errno::SRCH | Errno::INVAL) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // The lock was held when the pid was read. If it still is, the pid was not reused in between.
    if !matches!(ShimStatus::read(bundle), Ok(ShimStatus::Alive(_))) {
        return Ok(());
    }
    let exiting = shim_socket(bundle).is_some_and(|socket| !socket.exists());
    if exiting && wait(process.as_fd(), PollFlags::IN, SHUTDOWN_LIMIT)? {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    if wait(process.as_fd(), PollFlags::IN, AFTER_KILL_LIMIT)? {
        Ok(())
    } else {
        Err(io::Error::new(ErrorKind::TimedOut, "it did not exit after SIGKILL"))
    }
}

/// The path of the socket, from the file `address` that `start` has written into the bundle.
fn shim_socket(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    address.trim().strip_prefix("unix://").map(PathBuf::from)
}

/// Unmounts everything that is mounted at `path`.
fn unmount_all(path: &Path) -> io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there, or everything is unmounted.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(with_step(error, &format!("unmount {}", path.display()))),
        }
    }
}

/// Kills the processes of a cgroup and removes it. A concurrent removal by another `delete` is not an error.
fn remove_cgroup(path: &Path, deadline: Instant) -> io::Result<()> {
    let step = format!("remove control group {}", path.display());
    if !path.starts_with("/sys/fs/cgroup") {
        return Err(with_step(io::Error::other("it is not below /sys/fs/cgroup"), &step));
    }
    let deadline = match is_left_behind(path) {
        true => deadline.min(Instant::now() + LEFT_BEHIND_LIMIT),
        false => deadline,
    };
    match empty_and_remove_cgroup(path, deadline) {
        // Open files of a removed cgroup fail with ENODEV (kernfs).
        Err(error) if error.kind() != ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV) => {
            leave_behind(path);
            Err(with_step(error, &step))
        }
        _ => Ok(()),
    }
}

/// Uses `cgroup.kill` of cgroup v2, and waits for a change of `cgroup.events` until the cgroup is empty.
fn empty_and_remove_cgroup(path: &Path, deadline: Instant) -> io::Result<()> {
    let events = fs::File::open(path.join("cgroup.events"))?;
    fs::write(path.join("cgroup.kill"), "1")?;
    loop {
        // A change after this read wakes the wait below, so none is missed.
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

/// Adds the failed step, an infinitive, to the text of the error.
fn with_step(error: impl Into<io::Error>, step: &str) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("cannot {step}: {error}"))
}

/// Waits for `event` on `fd`. Returns whether it came within `timeout`.
fn wait(fd: BorrowedFd<'_>, event: PollFlags, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).map_err(|_| ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::new(&fd, event)];
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn bundle(parent: &Path, id: &str, address: &str) -> PathBuf {
        let bundle = parent.join(id);
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("address"), address).unwrap();
        bundle
    }

    /// Waits until no process has the lock. A process that another test forks shares it until its exec.
    fn await_release(bundle: &Path) {
        let file = fs::File::open(bundle.join("shim.pid")).unwrap();
        rustix::fs::flock(file, rustix::fs::FlockOperation::LockShared).unwrap();
    }

    /// Spawns a process that holds the bundle's lock, as a shim does.
    fn spawn_shim(bundle: &Path) -> std::process::Child {
        let pid_file = PidFile::create(bundle).unwrap();
        let lock = Stdio::from(pid_file.share().unwrap());
        let shim = Command::new("sleep").arg("1000").stdout(lock).spawn().unwrap();
        pid_file.write(shim.id()).unwrap();
        shim
    }

    #[test]
    fn missing_and_empty_bundles_report_a_killed_container() {
        let directory = tempfile::tempdir().unwrap();
        for bundle in [Path::new("/no/such/bundle"), directory.path()] {
            for _ in 0..2 {
                let response = clean_up(bundle);
                assert_eq!((response.pid, response.exit_status), (0, 137));
                assert!(response.exited_at.seconds > 1_700_000_000);
            }
        }
    }

    #[test]
    fn recorded_exit_is_reported() {
        let bundle = tempfile::tempdir().unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::new(5, 6);
        ExitRecord::new(41, 3, at).store(bundle.path()).unwrap();
        let response = clean_up(bundle.path());
        assert_eq!((response.pid, response.exit_status), (41, 3));
        assert_eq!((response.exited_at.seconds, response.exited_at.nanos), (5, 6));
    }

    #[test]
    fn recorded_path_outside_of_cgroupfs_is_refused_and_delete_can_be_repeated() {
        let bundle = tempfile::tempdir().unwrap();
        let record = ResourceRecord {
            cgroups: vec!["/sys/fs/cgroup/no-such-cgroup".into(), "/etc".into()],
        };
        record.store(bundle.path()).unwrap();
        clean_up(bundle.path());
        clean_up(bundle.path());
        assert!(Path::new("/etc").exists());
    }

    #[test]
    fn hung_shim_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        fs::write(&socket, "").unwrap();
        let bundle = bundle(directory.path(), "c1", &format!("unix://{}", socket.display()));
        let mut shim = spawn_shim(&bundle);
        clean_up(&bundle);
        assert!(!shim.wait().unwrap().success());
        await_release(&bundle);
        assert!(matches!(ShimStatus::read(&bundle).unwrap(), ShimStatus::Dead));
    }

    #[test]
    fn shim_of_another_bundle_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let sandbox = bundle(directory.path(), "pod", "unix:///s");
        let member = bundle(directory.path(), "c1", "unix:///s");
        let mut shim = spawn_shim(&sandbox);
        clean_up(&member);
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
        let mut shim = spawn_shim(&members[0]);
        clean_up(&members[0]);
        fs::remove_dir_all(&members[0]).unwrap();
        assert!(matches!(
            ShimStatus::read(&members[1]).unwrap(),
            ShimStatus::Alive(Some(_))
        ));
        fs::write(directory.path().join("socket"), "").unwrap();
        clean_up(&members[1]);
        assert!(!shim.wait().unwrap().success());
    }

    #[test]
    fn unlocked_pid_file_kills_no_process() {
        let directory = tempfile::tempdir().unwrap();
        let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid_file = PidFile::create(directory.path()).unwrap();
        pid_file.write(bystander.id()).unwrap();
        drop(pid_file);
        await_release(directory.path());
        clean_up(directory.path());
        assert!(bystander.try_wait().unwrap().is_none());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }
}
