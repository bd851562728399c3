//! The host's clock: readings of it, and its rate.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// A simultaneous reading of two clocks of the host, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostTime {
    /// `CLOCK_MONOTONIC_RAW`, which nothing adjusts. KVM's clock in the guest has its rate.
    pub(super) raw: i64,
    /// `CLOCK_REALTIME`.
    pub(super) real: i64,
    /// `real` was read at most this long before or after `raw`.
    pub(super) uncertainty: i64,
}

impl HostTime {
    /// Reads the clocks, without a system call unless the host's clock source requires one.
    pub(super) fn read() -> Self {
        /// A reading is repeated, up to this number of attempts, if the process was interrupted in it.
        const MAX_ATTEMPTS: usize = 4;
        /// A reading with at most this uncertainty is not repeated, in nanoseconds.
        const MAX_HOST_READING_UNCERTAINTY: i64 = 2_000;
        let read_once = || {
            let before = nanoseconds(clock_gettime(ClockId::MonotonicRaw));
            let real = nanoseconds(clock_gettime(ClockId::Realtime));
            let half = (nanoseconds(clock_gettime(ClockId::MonotonicRaw)) - before) / 2;
            Self {
                raw: before + half,
                real,
                uncertainty: half,
            }
        };
        let mut best = read_once();
        for _ in 1..MAX_ATTEMPTS {
            if best.uncertainty <= MAX_HOST_READING_UNCERTAINTY {
                break;
            }
            let next = read_once();
            if next.uncertainty < best.uncertainty {
                best = next;
            }
        }
        best
    }
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// The largest rate that adjtimex(2) can set, and some more. A larger one is a jump.
const MAX_RATE: f64 = 0.12;

/// How far a reading may be from the line of [`HostRate`] and still be on it, in nanoseconds: the kernel changes the
/// multiplier of its clock all the time to approximate the rate.
const TOLERANCE: f64 = 20_000.0;

/// The host's clock as a straight line: since a moment when its rate may have changed, it has had the same rate.
#[derive(Debug)]
pub(super) struct HostRate {
    start: HostTime,
    /// What `real` gains on `raw` in each nanosecond.
    rate: f64,
    /// Infinite while `start` is the only reading.
    uncertainty: f64,
    /// The last usable rate, possibly that of an earlier line.
    latest: f64,
}

/// A rate with at most this uncertainty is usable. An error of this size moves the guest's clock by about half a
/// millisecond before a later reading finds it.
const MAX_RATE_UNCERTAINTY: f64 = 1e-3;

impl HostRate {
    pub(super) fn new(start: HostTime) -> Self {
        Self {
            start,
            rate: 0.0,
            uncertainty: f64::INFINITY,
            latest: 0.0,
        }
    }

    /// Takes a reading into account. Returns whether it is on the line; if not, a new line starts with it.
    pub(super) fn observe(&mut self, now: HostTime) -> bool {
        let span = (now.raw - self.start.raw) as f64;
        if span <= 0.0 {
            return true;
        }
        let gain = (now.real - self.start.real) as f64 - span;
        let reading = (now.uncertainty + self.start.uncertainty) as f64;
        let rate = gain / span;
        let tolerance = TOLERANCE + reading + self.uncertainty * span;
        if rate.abs() > MAX_RATE || (gain - self.rate * span).abs() > tolerance {
            self.start = now;
            self.uncertainty = f64::INFINITY;
            return false;
        }
        let uncertainty = reading / span;
        if uncertainty < self.uncertainty {
            (self.rate, self.uncertainty) = (rate, uncertainty);
        }
        if self.is_known() {
            self.latest = self.rate;
        }
        true
    }

    /// Whether there were enough readings to know the rate of the line.
    pub(super) fn is_known(&self) -> bool {
        self.uncertainty <= MAX_RATE_UNCERTAINTY
    }

    /// The rate of the line, or of an earlier one while it is not known.
    pub(super) fn latest(&self) -> f64 {
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: i64, real: i64) -> HostTime {
        HostTime {
            raw,
            real,
            uncertainty: 100,
        }
    }

    #[test]
    fn reading_is_precise_and_clocks_advance() {
        let first = HostTime::read();
        let second = HostTime::read();
        assert!(
            first.raw < second.raw && first.real <= second.real,
            "{first:?} {second:?}"
        );
        // Far more than a reading takes, unless this test is not run for a while.
        assert!(first.uncertainty.min(second.uncertainty) < 50_000_000);
    }

    #[test]
    fn rate_follows_from_readings_and_a_change_starts_a_new_line() {
        let mut host = HostRate::new(at(0, 5_000));
        assert!(!host.is_known());

        assert!(host.observe(at(1_000_000_000, 1_000_025_000)));
        assert!((host.latest() - 20e-6).abs() < 1e-6, "{host:?}");
        assert!(host.observe(at(10_000_000_000, 10_000_205_000)));
        assert!((host.latest() - 20e-6).abs() < 1e-7, "{host:?}");

        assert!(!host.observe(at(11_000_000_000, 11_005_000_000)), "5 ms off the line");
        assert!(!host.is_known());
        assert!((host.latest() - 20e-6).abs() < 1e-7, "{host:?}");
        assert!(host.observe(at(11_010_000_000, 11_015_100_000)));
        assert!((host.latest() - 0.01).abs() < 1e-4, "{host:?}");
    }

    #[test]
    fn jump_is_no_rate() {
        let mut host = HostRate::new(at(0, 0));
        assert!(!host.observe(at(1_000_000, 2_000_000)));
        assert!(!host.is_known());
    }
}
