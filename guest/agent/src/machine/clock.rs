//! The machine's clock, which KVM's clock drives.

use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime_dynamic, clock_settime};

/// Sets it to the host's. `nanoseconds` since the epoch is what that was when it was sent.
pub(crate) fn set(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let sent = Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).map_err(io::Error::other)?,
        tv_nsec: i64::try_from(nanoseconds % SECOND).map_err(io::Error::other)?,
    };
    Ok(clock_settime(ClockId::Realtime, host_time().unwrap_or(sent))?)
}

/// The host's clock by a call of KVM (`ptp_kvm`), to the microsecond; not every host offers it.
fn host_time() -> Option<Timespec> {
    let clock = rustix::fs::open("/dev/ptp0", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    clock_gettime_dynamic(DynamicClockId::Dynamic(std::os::fd::AsFd::as_fd(&clock))).ok()
}
