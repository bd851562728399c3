//! Decides when the guest's clock is read, steered and set. It does no I/O: it receives readings,
//! and returns the next step.

use std::time::Duration;

use nutshell_protocol::{ClockReading, ClockSteering, MAX_CLOCK_RATE};

use super::{
    guest::{GuestClock, Verdict},
    host::{HostRate, HostTime},
};

const MILLISECOND: i64 = 1_000_000;
const SECOND: i64 = 1_000_000_000;

/// How often the host's clock is read while the guest is idle. It follows from the bound of 5 ms: a slew of 1 % that
/// starts just after a reading gains 4.5 ms until the next, which leaves 0.5 ms for everything else.
pub(super) const IDLE_INTERVAL: Duration = Duration::from_millis(450);

/// How often the host's clock is read while the guest runs, and so may read its own clock.
pub(super) const BUSY_INTERVAL: Duration = Duration::from_millis(200);

/// How often the host's clock is read after its rate has changed, or while the guest has a temporary rate.
const UNSETTLED_INTERVAL: Duration = Duration::from_millis(100);

/// How long a change of the host's rate counts as recent, in nanoseconds.
const SETTLING_TIME: i64 = 2 * SECOND;

/// How long to measure the host's new rate before the guest is steered.
const RATE_INTERVAL: Duration = Duration::from_millis(10);

/// A smaller deviation of the guest's clock is not worth waking the guest. Nanoseconds.
const MAX_DEVIATION: f64 = 200_000.0;

/// A larger deviation is removed by setting the clock. Nanoseconds.
const MAX_STEERED_DEVIATION: i64 = 100 * MILLISECOND;

/// How long the removal of a deviation takes, in nanoseconds, unless the rate would be beyond its limit.
const CORRECTION_TIME: f64 = 1e9;

/// The longest removal of a deviation, in nanoseconds. Another one removes the rest.
const MAX_CORRECTION_TIME: f64 = 5e9;

/// A reading that leaves the guest's clock more uncertain than this is repeated at once. Nanoseconds.
const MAX_READING_UNCERTAINTY: f64 = 500_000.0;

/// The maximum number of such repetitions in a row.
const MAX_REPEATED_READINGS: u32 = 8;

/// A new round of readings begins when the guest's clock may have become this uncertain, in nanoseconds.
const MAX_UNCERTAINTY: f64 = 300_000.0;

/// The shortest time between two rounds of readings, in nanoseconds. Each round of readings that leaves the clock more
/// uncertain than [`MAX_UNCERTAINTY`] doubles it.
const MIN_READING_INTERVAL: i64 = 5 * SECOND;

/// The longest time between two rounds of readings, in nanoseconds: a process of the guest may have changed the clock.
const MAX_READING_INTERVAL: i64 = 120 * SECOND;

/// The pause after a reading that contradicts what the shim knows, in nanoseconds. Each further one doubles it.
const FIRST_PAUSE: i64 = 100 * MILLISECOND;

/// The maximum number of times that an interval is doubled.
const MAX_DOUBLINGS: u32 = 9;

/// The largest rate that the guest's clock can have ([`MAX_CLOCK_RATE`]).
const MAX_RATE: f64 = MAX_CLOCK_RATE as f64 * 1e-9;

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Read the host's clock again after this time.
    Sleep(Duration),
    /// Send this to the guest.
    Ask(ClockRequest),
}

/// A request to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClockRequest {
    Read,
    Steer(ClockSteering),
    /// Set the clock to the host's time, and its rate to this one, in billionths.
    Set(i32),
}

#[derive(Debug)]
pub(super) struct Controller {
    host: HostRate,
    guest: GuestClock,
    /// The guest's clock must be set, whatever its error is.
    must_set: bool,
    // Moments of the host's raw clock, in nanoseconds.
    unsettled_until: i64,
    paused_until: i64,
    next_reading: i64,
    repeated_readings: u32,
    /// How many rounds of repeated readings in a row left the guest's clock uncertain.
    imprecise_readings: u32,
    /// How many readings in a row were contradictions.
    contradictions: u32,
}

impl Controller {
    /// The guest's clock is unknown: it is set first.
    pub(super) fn new(now: HostTime) -> Self {
        Self {
            host: HostRate::new(now),
            guest: GuestClock::new(now),
            must_set: true,
            unsettled_until: i64::MIN,
            paused_until: i64::MIN,
            next_reading: i64::MAX,
            repeated_readings: 0,
            imprecise_readings: 0,
            contradictions: 0,
        }
    }

    /// The host's clock was set.
    pub(super) fn host_jumped(&mut self) {
        self.must_set = true;
        self.paused_until = i64::MIN;
    }

    /// Decides on the next step. `is_busy` means that the guest has used a CPU recently.
    pub(super) fn next(&mut self, now: HostTime, is_busy: bool) -> Step {
        if !self.host.observe(now) {
            self.unsettled_until = now.raw + SETTLING_TIME;
        }
        self.guest.advance(now.raw);
        if now.raw < self.paused_until {
            let pause = Duration::from_nanos((self.paused_until - now.raw).unsigned_abs());
            return Step::Sleep(pause.min(IDLE_INTERVAL));
        }
        let error = now.real - self.guest.time();
        if self.must_set || error.abs() > MAX_STEERED_DEVIATION {
            return Step::Ask(ClockRequest::Set(self.permanent_rate()));
        }
        if now.raw >= self.next_reading {
            return Step::Ask(ClockRequest::Read);
        }
        let pending = self.guest.pending_gain();
        if (error as f64 - pending).abs() > MAX_DEVIATION {
            if !self.host.is_known() {
                return Step::Sleep(RATE_INTERVAL);
            }
            return match self.correct(error as f64) {
                // The rate is at its limit.
                ClockRequest::Steer(steering) if self.guest.is_steered(&steering) => Step::Sleep(UNSETTLED_INTERVAL),
                request => Step::Ask(request),
            };
        }
        Step::Sleep(if now.raw < self.unsettled_until || pending != 0.0 {
            UNSETTLED_INTERVAL
        } else if is_busy {
            BUSY_INTERVAL
        } else {
            IDLE_INTERVAL
        })
    }

    /// The rate at which the guest's clock keeps up with the host's, in billionths.
    fn permanent_rate(&self) -> i32 {
        billionths(((1.0 + self.host.latest()) / (1.0 + self.guest.skew()) - 1.0).clamp(-MAX_RATE, MAX_RATE))
    }

    /// The request that removes an error of the guest's clock: how much the host's is ahead, in nanoseconds.
    fn correct(&self, error: f64) -> ClockRequest {
        let rate = self.permanent_rate();
        let permanent = f64::from(rate) * 1e-9;
        let limit = (MAX_RATE - permanent * error.signum()).max(0.0) * error.signum();
        // The guest measures the correction time by the clock that it corrects, so the time depends on the rate.
        let needed = error * (1.0 + permanent) / (CORRECTION_TIME - error);
        let (temporary_rate, time) = if needed.abs() <= limit.abs() {
            (needed, CORRECTION_TIME)
        } else {
            let time = error * (1.0 + permanent + limit) / limit;
            if time > MAX_CORRECTION_TIME && error > self.guest.uncertainty() {
                // The guest's clock cannot catch up. Setting it forward is allowed: only steps backwards are not.
                return ClockRequest::Set(rate);
            }
            (limit, time.min(MAX_CORRECTION_TIME))
        };
        ClockRequest::Steer(ClockSteering {
            rate,
            temporary_rate: billionths(temporary_rate),
            temporary_milliseconds: milliseconds(time),
        })
    }

    /// The guest has answered `request`, which was sent at `sent`.
    pub(super) fn answered(
        &mut self,
        request: ClockRequest,
        sent: HostTime,
        received: HostTime,
        reading: &ClockReading,
    ) {
        /// The deviation of a guest whose clock follows the host's, in nanoseconds.
        const CLOSE: f64 = 5.0 * MAX_DEVIATION;
        match request {
            ClockRequest::Read => {}
            ClockRequest::Steer(steering) => self.guest.steer(sent, received, &steering),
            ClockRequest::Set(rate) => {
                self.guest.set(sent, received, rate);
                self.must_set = false;
            }
        }
        match self.guest.observe(sent, received, reading) {
            Some(Verdict::Agrees) => {
                // Only a later reading shows whether the guest does what it was requested to do.
                let error = (received.real - self.guest.time()) as f64;
                if request == ClockRequest::Read && error.abs() < CLOSE {
                    self.contradictions = 0;
                }
            }
            Some(Verdict::Contradicts) => self.pause(received),
            // The host's clock was set in between. That is reported separately, and then the guest's clock is set.
            None => {}
        }
        let uncertainty = self.guest.uncertainty();
        if uncertainty > MAX_READING_UNCERTAINTY && self.repeated_readings < MAX_REPEATED_READINGS {
            self.repeated_readings += 1;
            self.next_reading = received.raw;
            return;
        }
        self.repeated_readings = 0;
        self.imprecise_readings = if uncertainty > MAX_UNCERTAINTY {
            self.imprecise_readings.saturating_add(1)
        } else {
            0
        };
        let shortest = MIN_READING_INTERVAL << self.imprecise_readings.min(MAX_DOUBLINGS);
        let wait = self.guest.time_until_uncertain(MAX_UNCERTAINTY);
        self.next_reading = received.raw + wait.max(shortest).min(MAX_READING_INTERVAL);
    }

    /// The guest has refused a request.
    pub(super) fn refused(&mut self, now: HostTime) {
        self.pause(now);
    }

    fn pause(&mut self, now: HostTime) {
        let doublings = self.contradictions.min(MAX_DOUBLINGS);
        self.contradictions = self.contradictions.saturating_add(1);
        self.paused_until = now.raw + (FIRST_PAUSE << doublings);
    }

    /// Whether the guest's clock repeatedly does not do what it is requested to do.
    pub(super) fn is_failing(&self) -> bool {
        /// A process of the guest that changes the clock causes one contradiction.
        const TOLERATED_CONTRADICTIONS: u32 = 5;
        self.contradictions > TOLERATED_CONTRADICTIONS
    }
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
fn billionths(rate: f64) -> i32 {
    (rate * 1e9).round() as i32
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
fn milliseconds(nanoseconds: f64) -> u32 {
    (nanoseconds * 1e-6).round() as u32
}
