//! Sets the machine's clock. Between these calls it runs on KVM's clock source.

use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime_dynamic, clock_settime};

/// Sets the clock to the host's time. If that cannot be read through KVM, uses `nanoseconds` since the epoch, the
/// host's time when it sent the request.
pub(crate) fn set(nanoseconds: u64) -> io::Result<()> {
    const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;
    let sent = Timespec {
        tv_sec: i64::try_from(nanoseconds / NANOSECONDS_PER_SECOND).map_err(io::Error::other)?,
        tv_nsec: i64::try_from(nanoseconds % NANOSECONDS_PER_SECOND).map_err(io::Error::other)?,
    };
    Ok(clock_settime(ClockId::Realtime, host_time().unwrap_or(sent))?)
}

/// Reads the host's clock through KVM (driver `ptp_kvm`), with microsecond precision. Not every host supports it.
fn host_time() -> Option<Timespec> {
    let ptp_clock = rustix::fs::open("/dev/ptp0", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    clock_gettime_dynamic(DynamicClockId::Dynamic(std::os::fd::AsFd::as_fd(&ptp_clock))).ok()
}
