//! Sets and steers the machine's clock as the shim requests, and compares it with the host's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nutshell_protocol::{ClockReading, ClockSteering, MAX_CLOCK_RATE};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{
    ClockId, DynamicClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    clock_gettime_dynamic, clock_settime, timerfd_create, timerfd_settime,
};

use crate::poller::{Poller, Token};
use crate::sys;

const NANOSECONDS_PER_SECOND: i64 = 1_000_000_000;

const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The state of the steering.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    /// Expires at the end of a temporary rate. Created with the first one.
    timer: Option<OwnedFd>,
    /// The rate at the end of a temporary one, in billionths.
    permanent_rate: i32,
}

impl Clock {
    /// Sets the clock to the host's time. If that cannot be read through KVM, uses `nanoseconds` since the epoch, the
    /// host's time when it sent the request. Also sets the rate.
    pub(crate) fn set(&mut self, nanoseconds: u64, rate: i32) -> io::Result<ClockReading> {
        let sent = i64::try_from(nanoseconds).map_err(io::Error::other)?;
        let sent = Timespec {
            tv_sec: sent / NANOSECONDS_PER_SECOND,
            tv_nsec: sent % NANOSECONDS_PER_SECOND,
        };
        let host = HostClock::open().and_then(|host| host.read());
        clock_settime(ClockId::Realtime, host.unwrap_or(sent))?;
        self.arm(NEVER)?;
        set_rate(rate)?;
        Ok(read())
    }

    /// Changes the rate.
    pub(crate) fn steer(&mut self, poller: &Poller, steering: &ClockSteering) -> io::Result<ClockReading> {
        self.permanent_rate = steering.rate;
        let milliseconds = i64::from(steering.temporary_milliseconds);
        if steering.temporary_rate == 0 || milliseconds == 0 {
            self.arm(NEVER)?;
            set_rate(steering.rate)?;
            return Ok(read());
        }
        if self.timer.is_none() {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            poller.watch_input(&timer, Token::Clock)?;
            self.timer = Some(timer);
        }
        // Armed first: if the rate cannot be changed, the timer only sets it again.
        self.arm(Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: milliseconds % 1000 * 1_000_000,
        })?;
        set_rate(steering.rate.saturating_add(steering.temporary_rate))?;
        Ok(read())
    }

    /// Handles the timer's expiry.
    pub(crate) fn end_temporary_rate(&mut self) {
        let Some(timer) = &self.timer else {
            return;
        };
        let ended = match rustix::io::read(timer, &mut [0; 8]) {
            Ok(_) => set_rate(self.permanent_rate),
            // Armed again since the event.
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = ended {
            // Not the end of the machine: the shim finds the deviation and corrects it.
            eprintln!("nutshell-agent: cannot end a temporary rate of the clock: {error}");
        }
    }

    /// Arms the timer, or disarms it for [`NEVER`].
    fn arm(&self, time: Timespec) -> io::Result<()> {
        let Some(timer) = &self.timer else {
            return Ok(());
        };
        let once = Itimerspec {
            it_interval: NEVER,
            it_value: time,
        };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

/// Reads the clock, and compares it with the host's if KVM allows that.
pub(crate) fn read() -> ClockReading {
    /// A hypercall takes about a microsecond, unless the host interrupts it.
    const MAX_COMPARISONS: usize = 3;
    /// Nanoseconds.
    const SUFFICIENT_PRECISION: i64 = 20_000;
    let mut best: Option<(i64, i64)> = None;
    if let Some(host) = HostClock::open() {
        for _ in 0..MAX_COMPARISONS {
            let before = nanoseconds(clock_gettime(ClockId::Realtime));
            let Some(host) = host.read().map(nanoseconds) else {
                break;
            };
            let after = nanoseconds(clock_gettime(ClockId::Realtime));
            let lead = (before.saturating_sub(host), after.saturating_sub(host));
            let width = |(least, most): (i64, i64)| most.saturating_sub(least);
            if best.is_none_or(|best| width(lead) < width(best)) {
                best = Some(lead);
            }
            if width(lead) <= SUFFICIENT_PRECISION {
                break;
            }
        }
    }
    ClockReading {
        nanoseconds: nanoseconds(clock_gettime(ClockId::Realtime)),
        lead: best,
    }
}

/// The host's clock as KVM shows it (driver `ptp_kvm`), with microsecond precision. Not every host supports it.
struct HostClock(OwnedFd);

impl HostClock {
    fn open() -> Option<Self> {
        let clock = rustix::fs::open("/dev/ptp0", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        clock.ok().map(Self)
    }

    fn read(&self) -> Option<Timespec> {
        clock_gettime_dynamic(DynamicClockId::Dynamic(self.0.as_fd())).ok()
    }
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec
        .saturating_mul(NANOSECONDS_PER_SECOND)
        .saturating_add(time.tv_nsec)
}

/// Sets the rate of the clock, in billionths.
fn set_rate(rate: i32) -> io::Result<()> {
    let (tick, frequency) = tick_and_frequency(rate);
    sys::set_clock_rate(tick, frequency)
}

/// Splits a rate, in billionths, into the two parts that adjtimex(2) takes: the length of a tick in microseconds, of
/// which 10,000 are the rate 0, and what remains, in millionths scaled by 2^16.
fn tick_and_frequency(rate: i32) -> (i64, i64) {
    const NORMAL_TICK: i64 = 10_000;
    const BILLIONTHS_PER_TICK: i64 = 100_000;
    const BILLIONTHS_PER_MILLIONTH: i64 = 1000;
    let rate = i64::from(rate.clamp(-MAX_CLOCK_RATE, MAX_CLOCK_RATE));
    let ticks = (rate + BILLIONTHS_PER_TICK / 2).div_euclid(BILLIONTHS_PER_TICK);
    let rest = rate - ticks * BILLIONTHS_PER_TICK;
    (NORMAL_TICK + ticks, (rest << 16) / BILLIONTHS_PER_MILLIONTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_split_into_tick_and_frequency() {
        const PPM: i64 = 1 << 16;
        for (rate, expected) in [
            (0, (10_000, 0)),
            (1000, (10_000, PPM)),
            (-1000, (10_000, -PPM)),
            (49_999, (10_000, 49_999 * PPM / 1000)),
            (50_000, (10_001, -50 * PPM)),
            (-50_000, (10_000, -50 * PPM)),
            (-50_001, (9_999, 49_999 * PPM / 1000)),
            (500_000, (10_005, 0)),
            (10_000_000, (10_100, 0)),
            (-10_012_345, (9_900, -12_345 * PPM / 1000)),
            (MAX_CLOCK_RATE, (11_000, 0)),
            (-MAX_CLOCK_RATE, (9_000, 0)),
            (i32::MAX, (11_000, 0)),
            (i32::MIN, (9_000, 0)),
        ] {
            assert_eq!(tick_and_frequency(rate), expected, "{rate}");
        }
    }

    #[test]
    fn tick_and_frequency_give_the_rate_within_the_limits_of_the_kernel() {
        for rate in (-MAX_CLOCK_RATE..=MAX_CLOCK_RATE).step_by(12_347) {
            let (tick, frequency) = tick_and_frequency(rate);
            assert!((9_000..=11_000).contains(&tick), "{rate}: {tick}");
            assert!(frequency.abs() <= 500 << 16, "{rate}: {frequency}");
            let sum = (tick - 10_000) * 100_000 + ((frequency * 1000) >> 16);
            assert!((sum - i64::from(rate)).abs() <= 1, "{rate}: {sum}");
        }
    }
}
