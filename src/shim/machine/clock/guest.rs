//! The guest's clock as the shim knows it between readings.

use nutshell_protocol::{ClockReading, ClockSteering};

use super::host::HostTime;

/// How much the rate of the guest's clock source may differ from the rate of the host's, before it has been measured.
/// With KVM's clock they do not differ; a guest that uses the TSC calibrates it imprecisely.
const UNKNOWN_SKEW: f64 = 60e-6;

/// The minimum uncertainty of a measured skew.
const MIN_SKEW_UNCERTAINTY: f64 = 1e-6;

/// The largest skew. A larger one means that a process of the guest has changed the clock.
const MAX_SKEW: f64 = 500e-6;

/// The shortest time over which the skew is measured, in nanoseconds.
const MIN_SKEW_SPAN: f64 = 4e9;

/// How late the guest may end a temporary rate, in nanoseconds.
const TIMER_LATENESS: f64 = 5e6;

/// The largest lead of the guest's clock that a reading may report: 30 years, in nanoseconds. It bounds the numbers
/// that are computed here.
const MAX_LEAD: i64 = 1_000_000_000_000_000_000;

/// A reading that is further from what was computed is a contradiction. A shorter distance can be due to a host under
/// load, whose guest ends a temporary rate late. Nanoseconds.
const MAX_DISCREPANCY: f64 = 2e6;

/// Whether a reading is consistent with the interval that was computed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Agrees,
    Contradicts,
}

/// What the guest's clock shows, as an interval: it is within `uncertainty` of `time` when the host's raw clock is at
/// `raw`. Readings of the guest narrow the interval, time widens it. A reading that is less precise than what is known
/// changes nothing.
#[derive(Debug)]
pub(super) struct GuestClock {
    raw: i64,
    /// Nanoseconds since the epoch.
    time: i64,
    uncertainty: f64,
    /// The rate of the clock that the shim has requested.
    rate: f64,
    /// The temporary rate, which is added to `rate`, and when it ends by the host's raw clock.
    temporary: Option<(f64, i64)>,
    /// The rate of the guest's clock source relative to the host's raw clock.
    skew: f64,
    skew_uncertainty: f64,
    skew_start: SkewStart,
}

/// The start of a measurement of the skew.
#[derive(Debug)]
struct SkewStart {
    raw: i64,
    uncertainty: f64,
    /// The sum of the changes of `time` by readings since then.
    moved: f64,
    /// The uncertainty that steering has added since then.
    steered: f64,
}

impl GuestClock {
    pub(super) fn new(now: HostTime) -> Self {
        Self {
            raw: now.raw,
            time: now.real,
            uncertainty: f64::INFINITY,
            rate: 0.0,
            temporary: None,
            skew: 0.0,
            skew_uncertainty: UNKNOWN_SKEW,
            skew_start: SkewStart::new(now.raw, f64::INFINITY),
        }
    }

    /// Moves to a later moment of the host's raw clock.
    pub(super) fn advance(&mut self, raw: i64) {
        if let Some((_, end)) = self.temporary
            && end <= raw
        {
            self.advance_at_same_rate(end);
            if let Some((rate, _)) = self.temporary.take() {
                self.add_steering_uncertainty(rate.abs() * TIMER_LATENESS);
            }
        }
        self.advance_at_same_rate(raw);
    }

    fn advance_at_same_rate(&mut self, raw: i64) {
        let span = raw - self.raw;
        if span <= 0 {
            return;
        }
        let gain = span as f64 * self.total_rate();
        self.time += span + round(gain);
        self.uncertainty += span as f64 * self.skew_uncertainty;
        self.raw = raw;
    }

    /// The rate of the guest's clock relative to the host's raw clock.
    fn total_rate(&self) -> f64 {
        let rate = self.rate + self.temporary.map_or(0.0, |(rate, _)| rate);
        (1.0 + self.skew) * (1.0 + rate) - 1.0
    }

    fn add_steering_uncertainty(&mut self, nanoseconds: f64) {
        self.uncertainty += nanoseconds;
        self.skew_start.steered += nanoseconds;
    }

    pub(super) fn time(&self) -> i64 {
        self.time
    }

    pub(super) fn uncertainty(&self) -> f64 {
        self.uncertainty
    }

    pub(super) fn skew(&self) -> f64 {
        self.skew
    }

    /// What the clock gains until the end of the temporary rate, in nanoseconds.
    pub(super) fn pending_gain(&self) -> f64 {
        self.temporary
            .map_or(0.0, |(rate, end)| rate * (end - self.raw).max(0) as f64)
    }

    /// In how many nanoseconds the uncertainty reaches `limit`.
    pub(super) fn time_until_uncertain(&self, limit: f64) -> i64 {
        round((limit - self.uncertainty).max(0.0) / self.skew_uncertainty)
    }

    /// Whether the guest has these rates already, or almost.
    pub(super) fn is_steered(&self, steering: &ClockSteering) -> bool {
        const SAME: f64 = 20e-6;
        let temporary = self.temporary.map_or(0.0, |(rate, _)| rate);
        (self.rate - f64::from(steering.rate) * 1e-9).abs() < SAME
            && (temporary - f64::from(steering.temporary_rate) * 1e-9).abs() < SAME
    }

    /// The guest was requested to change its rate, and has answered.
    pub(super) fn steer(&mut self, sent: HostTime, received: HostTime, steering: &ClockSteering) {
        let window = (received.raw - sent.raw).max(0);
        self.advance(sent.raw + window / 2);
        let before = self.total_rate();
        self.rate = f64::from(steering.rate) * 1e-9;
        let rate = f64::from(steering.temporary_rate) * 1e-9;
        let length = f64::from(steering.temporary_milliseconds) * 1e6 / (1.0 + self.rate + rate);
        self.temporary = (rate != 0.0).then(|| (rate, self.raw + round(length)));
        let change = (self.total_rate() - before).abs();
        self.add_steering_uncertainty(change * window as f64 / 2.0);
        self.advance(received.raw);
    }

    /// The guest was requested to set its clock, and has answered.
    pub(super) fn set(&mut self, sent: HostTime, received: HostTime, rate: i32) {
        /// How much longer a guest may take to set its clock than to answer, in nanoseconds.
        const SETTING_TIME: f64 = 5e6;
        let half = (received.raw - sent.raw).max(0) / 2;
        self.raw = received.raw;
        self.time = received.real - half;
        self.uncertainty = half as f64 + SETTING_TIME;
        self.rate = f64::from(rate) * 1e-9;
        self.temporary = None;
        self.skew_start = SkewStart::new(self.raw, self.uncertainty);
    }

    /// Takes a reading of the guest into account, which it took between `sent` and `received`. `None` if the host's
    /// clock has jumped in between.
    pub(super) fn observe(&mut self, sent: HostTime, received: HostTime, reading: &ClockReading) -> Option<Verdict> {
        self.advance(received.raw);
        let (window, host_window) = (received.raw - sent.raw, received.real - sent.real);
        if (host_window - window).abs() > window / 8 + 1_000_000 {
            return None;
        }
        let (lower, upper) = reading.lead.unwrap_or((
            reading.nanoseconds.saturating_sub(received.real),
            reading.nanoseconds.saturating_sub(sent.real),
        ));
        if lower > upper || lower < -MAX_LEAD || upper > MAX_LEAD {
            return Some(Verdict::Contradicts);
        }
        // The lead changes between the guest's reading and `received`.
        let change = ((host_window - window) as f64 - self.total_rate() * window as f64).abs();
        // From here on, the bounds are relative to `self.time`.
        let offset = received.real - self.time;
        let (lower, upper) = (
            offset.saturating_add(lower) as f64 - change,
            offset.saturating_add(upper) as f64 + change,
        );
        let intersection = (lower.max(-self.uncertainty), upper.min(self.uncertainty));
        let overlap = intersection.1 - intersection.0;
        let (lower, upper) = if overlap >= 0.0 { intersection } else { (lower, upper) };
        let moved = f64::midpoint(lower, upper);
        self.time = self.time.saturating_add(round(moved));
        self.uncertainty = (upper - lower) / 2.0;
        if overlap >= 0.0 {
            self.skew_start.moved += moved;
            self.measure_skew();
        } else {
            self.skew_uncertainty = UNKNOWN_SKEW;
            self.skew_start = SkewStart::new(self.raw, self.uncertainty);
        }
        Some(if overlap >= -MAX_DISCREPANCY {
            Verdict::Agrees
        } else {
            Verdict::Contradicts
        })
    }

    /// Computes the skew from the movement since `skew_start`, if that is more precise than what is known.
    fn measure_skew(&mut self) {
        let start = &self.skew_start;
        let span = (self.raw - start.raw) as f64;
        if span < MIN_SKEW_SPAN {
            if self.uncertainty < start.uncertainty {
                self.skew_start = SkewStart::new(self.raw, self.uncertainty);
            }
            return;
        }
        let precision = (self.uncertainty + start.uncertainty + start.steered) / span;
        if precision >= self.skew_uncertainty {
            return;
        }
        let measured = self.skew + start.moved / span;
        let lower = (measured - precision).max(self.skew - self.skew_uncertainty);
        let upper = (measured + precision).min(self.skew + self.skew_uncertainty);
        if lower <= upper {
            self.skew = f64::midpoint(lower, upper);
            self.skew_uncertainty = ((upper - lower) / 2.0).max(MIN_SKEW_UNCERTAINTY);
        } else if measured.abs() < MAX_SKEW {
            self.skew = measured;
            self.skew_uncertainty = precision.max(MIN_SKEW_UNCERTAINTY);
        }
        self.skew_start = SkewStart::new(self.raw, self.uncertainty);
    }
}

impl SkewStart {
    fn new(raw: i64, uncertainty: f64) -> Self {
        Self {
            raw,
            uncertainty,
            moved: 0.0,
            steered: 0.0,
        }
    }
}

/// The nearest integer. Saturates, and is 0 for a NaN.
#[expect(
    clippy::cast_possible_truncation,
    reason = "`as` saturates, and callers pass nanoseconds"
)]
fn round(nanoseconds: f64) -> i64 {
    nanoseconds.round() as i64
}
