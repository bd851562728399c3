//! Freezes and thaws a container (cgroup v2, "cgroup.freeze").

use std::fs::{self, File};
use std::io;
use std::time::Duration;

use super::Cgroup;

/// How long processes may take to stop: one that is in the middle of a system call may be late.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);

/// Stops every process of the cgroup, or lets them go on, and waits until that is so.
pub(crate) fn set_frozen(cgroup: &Cgroup, frozen: bool) -> io::Result<()> {
    let events = File::open(cgroup.file("cgroup.events"))?;
    let write = |frozen: bool| fs::write(cgroup.file("cgroup.freeze"), if frozen { "1" } else { "0" });
    write(frozen)?;
    if super::wait_for_event(&events, "frozen", u64::from(frozen), FREEZE_TIMEOUT)? {
        return Ok(());
    }
    // As it was before: a failed request changes nothing.
    write(!frozen)?;
    Err(io::Error::new(io::ErrorKind::TimedOut, "its processes do not follow"))
}
