//! Freezes and thaws a container (cgroup v2, "cgroup.freeze").

use std::fs::{self, File};
use std::io;
use std::time::Duration;

use super::Cgroup;

/// The maximum time until all processes are frozen or thawed. A process in a system call may take longer than others.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);

/// Freezes or thaws all processes of the cgroup, and waits until the kernel has done so.
pub(crate) fn set_frozen(cgroup: &Cgroup, frozen: bool) -> io::Result<()> {
    let events = File::open(cgroup.file("cgroup.events"))?;
    let write = |frozen: bool| fs::write(cgroup.file("cgroup.freeze"), if frozen { "1" } else { "0" });
    write(frozen)?;
    if super::wait_for_event(&events, "frozen", u64::from(frozen), FREEZE_TIMEOUT)? {
        return Ok(());
    }
    // Undo the change: a failed request has no effect.
    write(!frozen)?;
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        "its processes did not change state in time",
    ))
}
