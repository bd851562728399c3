//! Removes what there is of a container.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nutshell_protocol::Failure;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{bundle, cgroup::Cgroup, rootfs, state_folder};
use crate::job::Context;

/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Kills the container's processes, removes its cgroup, unmounts its rootfs, removes its files. Goes
/// on after an error, and returns the first. Fine if there is nothing.
pub(crate) fn remove_all(id: &str, cgroup: Option<&Cgroup>) -> Result<(), Failure> {
    let mut first = Ok(());
    let mut note = |result: Result<(), Failure>| {
        if first.is_ok() {
            first = result;
        }
    };
    if let Some(cgroup) = cgroup {
        note(empty(cgroup).context(|| format!("kill the processes of container {id}")));
        note(
            cgroup
                .remove()
                .context(|| format!("remove cgroup {}", cgroup.path().display())),
        );
    }
    let bundle = bundle(id);
    let unmounted = rootfs::unmount(&bundle.join("rootfs")).context(|| format!("unmount the rootfs of container {id}"));
    // Never with the rootfs still in it.
    let clear = unmounted.is_ok();
    note(unmounted);
    if clear {
        note(remove_folder(&bundle));
    }
    note(remove_folder(&state_folder(id)));
    first
}

/// Kills what is in the cgroup and waits until it is gone.
fn empty(cgroup: &Cgroup) -> io::Result<()> {
    let events = match fs::File::open(cgroup.file("cgroup.events")) {
        Ok(events) => events,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    cgroup.kill()?;
    let deadline = Instant::now() + PATIENCE;
    while read_key(&events, "populated")? != 0 {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "they survive SIGKILL"));
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)))?;
    }
    Ok(())
}

/// The value of `key` in a flat keyed cgroup file, read anew.
pub(crate) fn read_key(file: &fs::File, key: &str) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 512];
    let read = file.read_at(&mut bytes, 0)?;
    let text = String::from_utf8_lossy(&bytes[..read]);
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    value.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {key}")))
}

fn remove_folder(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
