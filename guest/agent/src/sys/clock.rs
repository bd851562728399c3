//! The rate of the machine's clock.

use std::io;

use super::check;

/// Sets the rate of the clock: the length of a tick in microseconds, and a further change in millionths scaled by 2^16
/// (adjtimex(2), `tick` and `freq`). Cancels all that another process has started: a correction by adjtime(3) or by the
/// kernel's phase-locked loop, and leap seconds.
pub(crate) fn set_clock_rate(tick: i64, frequency: i64) -> io::Result<()> {
    // SAFETY: `timex` has only integer fields, for which all zeros is a value.
    let mut adjtime: libc::timex = unsafe { std::mem::zeroed() };
    adjtime.modes = libc::ADJ_OFFSET_SINGLESHOT;
    // SAFETY: the kernel reads and writes `adjtime`, which outlives the call.
    check(unsafe { libc::adjtimex(&raw mut adjtime) })?;

    // SAFETY: as above.
    let mut rate: libc::timex = unsafe { std::mem::zeroed() };
    // An offset of 0 empties the phase-locked loop, but only while it is on. STA_FREQHOLD keeps it from
    // changing the frequency.
    rate.modes = libc::ADJ_TICK | libc::ADJ_FREQUENCY | libc::ADJ_STATUS | libc::ADJ_OFFSET;
    rate.status = libc::STA_PLL | libc::STA_FREQHOLD | libc::STA_UNSYNC;
    rate.tick = tick;
    rate.freq = frequency;
    // SAFETY: the kernel reads and writes `rate`, which outlives the call.
    check(unsafe { libc::adjtimex(&raw mut rate) }).map(drop)
}
