//! The job that deletes a container.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nutshell_protocol::{DELETION_KILL_TIMEOUT, Failure};

use super::{bundle_path, rootfs, state_path};
use crate::cgroup::{self, Cgroup};
use crate::failure::Context;
use crate::machine::share;

/// The maximum time for processes that probably never end.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(1);

/// Kills the container's processes, removes its cgroup, unmounts its root file system and removes its files. Continues
/// after an error and returns the first one. A part that does not exist is not an error.
pub(crate) fn remove_all(id: &str) -> Result<(), Failure> {
    let cgroup = Cgroup::of_container(id);
    let killed =
        kill_processes(&cgroup, DELETION_KILL_TIMEOUT).context(|| format!("kill the processes of container {id}"));
    let removed = remove_cgroup(&cgroup);
    let files = remove_files(id);
    killed.and(removed).and(files)
}

/// Like [`remove_all`], but leaves processes that do not end, and their cgroup. The kernel unmounts what they use when
/// they end.
pub(crate) fn abandon(id: &str) -> Result<(), Failure> {
    let cgroup = Cgroup::of_container(id);
    let have_ended = kill_processes(&cgroup, ABANDON_TIMEOUT).is_ok();
    let removed = if have_ended { remove_cgroup(&cgroup) } else { Ok(()) };
    let files = remove_files(id);
    removed.and(files)
}

fn remove_cgroup(cgroup: &Cgroup) -> Result<(), Failure> {
    cgroup
        .remove()
        .context(|| format!("remove cgroup {}", cgroup.path().display()))
}

/// Unmounts the container's root file system and removes its files. Continues after an error and returns the first one.
fn remove_files(id: &str) -> Result<(), Failure> {
    let mut first = Ok(());
    let mut keep_first_error = |result: Result<(), Failure>| {
        if first.is_ok() {
            first = result;
        }
    };
    let bundle = bundle_path(id);
    keep_first_error(rootfs::unmount_filled(&bundle).context(|| format!("unmount a tmpfs of container {id}")));
    let unmounted = rootfs::unmount(&bundle.join("rootfs")).context(|| format!("unmount the rootfs of container {id}"));
    let layers_unmounted =
        rootfs::unmount_layers(&bundle).context(|| format!("unmount a layer of the rootfs of container {id}"));
    // If a file system is still mounted, removing the bundle would delete its files.
    let is_unmounted = unmounted.is_ok() && layers_unmounted.is_ok();
    keep_first_error(unmounted);
    keep_first_error(layers_unmounted);
    if is_unmounted {
        keep_first_error(remove_directory(&bundle));
    }
    keep_first_error(remove_directory(&state_path(id)));
    keep_first_error(share::leave_common(id).context(|| format!("unmount shared directories of container {id}")));
    first
}

/// Kills the processes of the cgroup, and waits until they have ended. Fails after `timeout`.
fn kill_processes(cgroup: &Cgroup, timeout: Duration) -> io::Result<()> {
    let events = match fs::File::open(cgroup.file("cgroup.events")) {
        Ok(events) => events,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    cgroup.kill()?;
    match cgroup::wait_for_event(&events, "populated", 0, timeout)? {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "processes did not end after SIGKILL",
        )),
    }
}

fn remove_directory(directory: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}
