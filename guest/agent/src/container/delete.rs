//! Removes what there is of a container.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nutshell_protocol::Failure;

use super::{bundle, rootfs, state_folder};
use crate::cgroup::{self, Cgroup};
use crate::failure::Context;

/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Kills the container's processes, removes its cgroup, unmounts its rootfs, removes its files. Goes
/// on after an error, and returns the first. Fine if there is nothing.
pub(crate) fn remove_all(id: &str) -> Result<(), Failure> {
    let mut first = Ok(());
    let mut note = |result: Result<(), Failure>| {
        if first.is_ok() {
            first = result;
        }
    };
    let cgroup = Cgroup::of(id);
    note(empty(&cgroup).context(|| format!("kill the processes of container {id}")));
    note(
        cgroup
            .remove()
            .context(|| format!("remove cgroup {}", cgroup.path().display())),
    );
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
    match cgroup::wait_for_event(&events, "populated", 0, PATIENCE)? {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, "they survive SIGKILL")),
    }
}

fn remove_folder(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
