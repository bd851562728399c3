//! Tests of the controller with a simulated host and guest. The simulation's own time is the host's raw clock.

#![expect(
    clippy::cast_possible_truncation,
    reason = "times are far below the limits of their types"
)]

use nutshell_protocol::{ClockReading, ClockSteering};

use super::{
    controller::{BUSY_INTERVAL, ClockRequest, Controller, IDLE_INTERVAL, Step},
    host::HostTime,
};

const MICROSECOND: i64 = 1_000;
const MILLISECOND: i64 = 1_000_000;
const SECOND: i64 = 1_000_000_000;
const EPOCH: i64 = 1_800_000_000 * SECOND;

/// The bound that the guest's clock keeps, in nanoseconds.
const BOUND: f64 = 5e6;

/// A host and a guest.
#[derive(Debug, Clone)]
struct Scenario {
    /// The rates of the host's clock relative to its raw clock: from which moment on, and the rate.
    rates: Vec<(i64, f64)>,
    /// Jumps of the host's clock: the moment, and by how many nanoseconds.
    jumps: Vec<(i64, f64)>,
    /// The rate of the guest's clock source.
    skew: f64,
    /// The largest latency of a request, and of an answer.
    latency: i64,
    can_read_host: bool,
    is_busy: bool,
    /// From when until when the shim does not run.
    suspended: Option<(i64, i64)>,
    /// A process in the guest changes the clock: the moment, by how many nanoseconds, and by which rate.
    tampering: Option<(i64, f64, f64)>,
    length: i64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            rates: Vec::new(),
            jumps: Vec::new(),
            skew: 0.0,
            latency: MILLISECOND,
            can_read_host: true,
            is_busy: false,
            suspended: None,
            tampering: None,
            length: 80 * SECOND,
        }
    }
}

#[derive(Debug, Default)]
struct Outcome {
    /// The deviation of the guest at many moments after it was set: when, and the host's clock minus the guest's.
    deviations: Vec<(i64, f64)>,
    /// How often the guest's clock was set to an earlier time than it showed.
    backward_steps: usize,
    requests: usize,
    /// How often the shim has woken for a timer.
    wakeups: usize,
}

impl Outcome {
    fn worst(&self, from: i64, to: i64) -> f64 {
        let within = self.deviations.iter().filter(|(time, _)| (from..to).contains(time));
        within.map(|(_, deviation)| deviation.abs()).fold(0.0, f64::max)
    }
}

struct World {
    scenario: Scenario,
    /// The moment up to which the simulation has run.
    now: i64,
    /// The host's clock, in nanoseconds since [`EPOCH`].
    host: f64,
    /// The guest's clock, in nanoseconds since [`EPOCH`].
    guest: f64,
    /// The permanent rate of the guest's clock.
    rate: f64,
    /// The temporary rate of the guest's clock, and for how many nanoseconds of that clock it still applies.
    temporary: Option<(f64, f64)>,
    /// Whether the shim has set the guest's clock.
    is_set: bool,
    random: u64,
    outcome: Outcome,
}

impl World {
    /// Lets time pass, in small steps.
    fn pass(&mut self, until: i64) {
        while self.now < until {
            let step = (until - self.now).min(2 * MILLISECOND);
            let host_rate = self.scenario.rates.iter().rev().find(|(from, _)| *from <= self.now);
            let before = self.now;
            self.now += step;
            self.host += step as f64 * (1.0 + host_rate.map_or(0.0, |(_, rate)| *rate));
            for (_, jump) in self
                .scenario
                .jumps
                .iter()
                .filter(|(at, _)| (before..self.now).contains(at))
            {
                self.host += jump;
            }
            let total = self.rate + self.temporary.map_or(0.0, |(rate, _)| rate);
            let gain = step as f64 * (1.0 + self.scenario.skew) * (1.0 + total);
            self.guest += gain;
            if let Some((_, left)) = &mut self.temporary {
                *left -= gain;
                if *left <= 0.0 {
                    self.temporary = None;
                }
            }
            if let Some((at, offset, rate)) = self.scenario.tampering
                && (before..self.now).contains(&at)
            {
                self.guest += offset;
                self.rate += rate;
            }
            if self.is_set {
                self.outcome.deviations.push((self.now, self.host - self.guest));
            }
        }
    }

    /// Between 0 and 1 (xorshift).
    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn host_time(&mut self) -> HostTime {
        let uncertainty = MICROSECOND;
        let error = (self.random() * 2.0 - 1.0) * uncertainty as f64;
        HostTime {
            raw: self.now,
            real: EPOCH + (self.host + error) as i64,
            uncertainty,
        }
    }

    fn travel(&mut self) {
        let latency = self.random() * self.scenario.latency as f64;
        self.pass(self.now + latency as i64);
    }

    /// Handles a request as the agent does.
    fn handle(&mut self, request: ClockRequest, sent: HostTime) -> ClockReading {
        match request {
            ClockRequest::Read => {}
            ClockRequest::Steer(ClockSteering {
                rate,
                temporary_rate,
                temporary_milliseconds,
            }) => {
                self.rate = f64::from(rate) * 1e-9;
                let length = f64::from(temporary_milliseconds) * 1e6;
                self.temporary = (temporary_rate != 0).then_some((f64::from(temporary_rate) * 1e-9, length));
            }
            ClockRequest::Set(rate) => {
                let time = if self.scenario.can_read_host {
                    self.host
                } else {
                    (sent.real - EPOCH) as f64
                };
                if self.is_set && time < self.guest {
                    self.outcome.backward_steps += 1;
                }
                self.guest = time;
                self.rate = f64::from(rate) * 1e-9;
                self.temporary = None;
            }
        }
        let width = 20.0 * MICROSECOND as f64;
        let lower = self.guest - self.host - width * self.random();
        ClockReading {
            nanoseconds: EPOCH + self.guest as i64,
            lead: self
                .scenario
                .can_read_host
                .then_some((lower as i64, (lower + width) as i64)),
        }
    }
}

fn simulate(scenario: Scenario) -> Outcome {
    let mut world = World {
        now: 0,
        host: 0.0,
        // A booted guest has lost some time.
        guest: -0.3 * SECOND as f64,
        rate: 0.0,
        temporary: None,
        is_set: false,
        random: 0x9e37_79b9_7f4a_7c15,
        outcome: Outcome::default(),
        scenario,
    };
    let mut controller = Controller::new(world.host_time());
    world.pass(150 * MILLISECOND);
    let mut reported_jumps = 0;
    while world.now < world.scenario.length {
        if let Some((from, to)) = world.scenario.suspended
            && (from..to).contains(&world.now)
        {
            world.pass(to);
        }
        let jumps = world.scenario.jumps.iter().filter(|(at, _)| *at < world.now).count();
        if jumps > reported_jumps {
            reported_jumps = jumps;
            controller.host_jumped();
        }
        let now = world.host_time();
        match controller.next(now, world.scenario.is_busy) {
            Step::Sleep(time) => {
                world.outcome.wakeups += 1;
                // The timer is up to a millisecond late. The kernel reports a jump at once.
                let late = world.random() * MILLISECOND as f64;
                let end = world.now + time.as_nanos() as i64 + late as i64;
                let jump = world.scenario.jumps.iter().map(|(at, _)| at + MILLISECOND);
                let jump = jump.filter(|at| *at > world.now).min().unwrap_or(i64::MAX);
                world.pass(end.min(jump));
            }
            Step::Ask(request) => {
                world.outcome.requests += 1;
                let sent = world.host_time();
                world.travel();
                let reading = world.handle(request, sent);
                world.travel();
                world.is_set = true;
                let received = world.host_time();
                controller.answered(request, sent, received, &reading);
            }
        }
    }
    world.outcome
}

/// Rates of a host whose clock is slewed for 20 s. The slew begins at a different moment between two readings of the
/// shim in each item.
fn slews(rate: f64) -> impl Iterator<Item = Vec<(i64, f64)>> {
    let start = 40 * SECOND;
    (0..8).map(move |eighth| {
        let start = start + eighth * 59 * MILLISECOND;
        vec![(0, 5e-6), (start, 5e-6 + rate), (start + 20 * SECOND, 5e-6)]
    })
}

#[test]
fn guest_stays_within_the_bound_while_the_host_is_slewed() {
    for rate in [0.0, 100e-6, -100e-6, 500e-6, -500e-6, 0.005, 0.01, -0.01] {
        for skew in [0.0, 50e-6, -50e-6] {
            for (can_read_host, is_busy) in [(true, false), (true, true), (false, true)] {
                for rates in slews(rate) {
                    let outcome = simulate(Scenario {
                        rates,
                        skew,
                        can_read_host,
                        is_busy,
                        ..Scenario::default()
                    });
                    let worst = outcome.worst(0, i64::MAX);
                    let case = format!("rate {rate}, skew {skew}, reads host {can_read_host}, busy {is_busy}");
                    assert!(worst <= BOUND, "{case}: {worst}");
                    assert_eq!(outcome.backward_steps, 0, "{case}");
                }
            }
        }
    }
}

#[test]
fn faster_slew_is_followed_after_one_interval() {
    for (rate, is_busy) in [
        (0.02, true),
        (-0.02, true),
        (0.05, false),
        (-0.05, false),
        (0.099, true),
        (0.1, false),
    ] {
        for rates in slews(rate) {
            let (start, end) = (rates[1].0, rates[2].0);
            let interval = if is_busy { BUSY_INTERVAL } else { IDLE_INTERVAL };
            let outcome = simulate(Scenario {
                rates,
                is_busy,
                ..Scenario::default()
            });
            // The deviation that arises before the shim has noticed the slew and steered the guest.
            let unnoticed = rate.abs() * (interval.as_nanos() as f64 + 20e6) + 0.5e6;
            let worst = outcome.worst(0, i64::MAX);
            assert!(worst <= unnoticed, "rate {rate}, busy {is_busy}: {worst}");
            let followed = outcome.worst(start + 2 * SECOND, end);
            assert!(followed <= BOUND, "rate {rate}, busy {is_busy}: {followed}");
            let recovered = outcome.worst(end + 2 * SECOND, i64::MAX);
            assert!(recovered <= BOUND, "rate {rate}, busy {is_busy}: {recovered}");
            assert_eq!(outcome.backward_steps, 0, "rate {rate}, busy {is_busy}");
        }
    }
}

/// The host has about the lowest rate that Linux can set. The guest cannot be slower, so it cannot lose what it gained
/// before it was steered.
#[test]
fn slowest_host_is_followed_without_steps_backwards() {
    for rates in slews(-0.1) {
        let end = rates[2].0;
        let outcome = simulate(Scenario {
            rates,
            is_busy: true,
            ..Scenario::default()
        });
        assert!(outcome.worst(0, i64::MAX) <= 25e6);
        assert!(outcome.worst(end + 2 * SECOND, i64::MAX) <= BOUND);
        assert_eq!(outcome.backward_steps, 0);
        assert!(outcome.requests < 100, "{}", outcome.requests);
    }
}

#[test]
fn changing_rates_are_followed() {
    let stop_and_go = |period: i64| {
        let changes = (20 * SECOND / period..70 * SECOND / period).map(|change| {
            let rate = if change % 2 == 0 { 0.01 } else { 0.0 };
            (change * period, rate)
        });
        changes.collect::<Vec<_>>()
    };
    // A phase-locked loop removes an eighth of its offset in each second.
    let decaying = (0..40).map(|second| ((20 + second) * SECOND, 0.01 * 0.875f64.powi(second as i32)));
    let alternating = (10..30).map(|second| (second * SECOND * 2, if second % 2 == 0 { 0.005 } else { -0.005 }));
    for rates in [
        stop_and_go(100 * MILLISECOND),
        stop_and_go(700 * MILLISECOND),
        stop_and_go(3 * SECOND),
        stop_and_go(11 * SECOND),
        decaying.collect(),
        alternating.collect(),
    ] {
        let outcome = simulate(Scenario {
            rates: rates.clone(),
            is_busy: true,
            ..Scenario::default()
        });
        let worst = outcome.worst(0, i64::MAX);
        assert!(worst <= BOUND, "{rates:?}: {worst}");
        assert_eq!(outcome.backward_steps, 0, "{rates:?}");
    }
}

#[test]
fn noisy_answers_do_not_disturb_the_clock() {
    for skew in [0.0, 50e-6, -50e-6] {
        for rates in slews(0.002) {
            let outcome = simulate(Scenario {
                rates,
                skew,
                latency: 10 * MILLISECOND,
                can_read_host: false,
                length: 600 * SECOND,
                ..Scenario::default()
            });
            // The clock is first set to a time that is as old as the request.
            let worst = outcome.worst(2 * SECOND, i64::MAX);
            assert!(worst <= BOUND, "skew {skew}: {worst}");
            assert_eq!(outcome.backward_steps, 0);
        }
    }
}

#[test]
fn idle_pod_gets_few_requests_and_rarely_wakes_the_shim() {
    for (skew, can_read_host) in [(0.0, true), (20e-6, true), (0.0, false)] {
        let scenario = |length| Scenario {
            rates: vec![(0, 12e-6)],
            skew,
            can_read_host,
            length,
            ..Scenario::default()
        };
        let (hour, first_minutes) = (simulate(scenario(3600 * SECOND)), simulate(scenario(300 * SECOND)));
        assert!(hour.worst(0, i64::MAX) < 2.5e6, "skew {skew}");
        let (requests, wakeups) = (
            hour.requests - first_minutes.requests,
            hour.wakeups - first_minutes.wakeups,
        );
        let limit = if can_read_host { 3300 / 60 } else { 3300 / 10 };
        assert!(requests <= limit, "skew {skew}, reads host {can_read_host}: {requests}");
        assert!(wakeups <= 3300 * 23 / 10, "skew {skew}: {wakeups}");
    }
}

#[test]
fn only_a_missed_slew_exceeds_the_bound_after_a_suspension_of_the_shim() {
    for rate in [500e-6, 0.01, -0.01] {
        // The shim is suspended while the guest has a temporary rate.
        let (from, to) = (41 * SECOND, 50 * SECOND);
        for tenth in 0..10 {
            let outcome = simulate(Scenario {
                rates: vec![(40 * SECOND + tenth * 47 * MILLISECOND, rate)],
                suspended: Some((from, to)),
                ..Scenario::default()
            });
            let worst = outcome.worst(0, from);
            assert!(worst <= BOUND, "rate {rate}: {worst}");
            // The permanent rate may come from an early measurement, but the temporary rate has ended, so the deviation
            // stays within the bound.
            let suspended = outcome.worst(from, to);
            assert!(suspended <= BOUND, "rate {rate}: {suspended}");
            assert!(outcome.worst(to + 2 * SECOND, i64::MAX) <= BOUND);
            assert_eq!(outcome.backward_steps, 0, "rate {rate}");
        }
    }
    // All of the slew is missed.
    let outcome = simulate(Scenario {
        rates: vec![(40 * SECOND, 0.004), (50 * SECOND, 0.0)],
        suspended: Some((39 * SECOND, 60 * SECOND)),
        ..Scenario::default()
    });
    let missed = outcome.worst(40 * SECOND, 60 * SECOND);
    assert!((39e6..41e6).contains(&missed), "{missed}");
    let recovered = outcome.worst(62 * SECOND, i64::MAX);
    assert!(recovered <= BOUND, "{recovered}");
}

#[test]
fn jump_of_the_host_is_followed_at_once() {
    for jump in [0.02, 0.5, -0.02, -0.5, 3600.0, -3600.0] {
        let outcome = simulate(Scenario {
            rates: vec![(0, 20e-6)],
            jumps: vec![(30 * SECOND, jump * SECOND as f64)],
            ..Scenario::default()
        });
        assert!(outcome.worst(0, 30 * SECOND) <= BOUND, "{jump}");
        let worst = outcome.worst(30 * SECOND + 5 * MILLISECOND, i64::MAX);
        assert!(worst <= BOUND, "{jump}: {worst}");
        assert_eq!(outcome.backward_steps, usize::from(jump < 0.0), "{jump}");
    }
}

#[test]
fn change_of_the_clock_in_the_guest_is_undone() {
    for (offset, rate) in [
        (0.05, 0.0),
        (-0.05, 0.0),
        (10.0, 0.0),
        (-10.0, 0.0),
        (0.0, 0.001),
        (0.02, -0.05),
    ] {
        for can_read_host in [true, false] {
            let outcome = simulate(Scenario {
                tampering: Some((130 * SECOND, offset * SECOND as f64, rate)),
                can_read_host,
                length: 600 * SECOND,
                ..Scenario::default()
            });
            let worst = outcome.worst(300 * SECOND, i64::MAX);
            assert!(
                worst <= BOUND,
                "offset {offset}, rate {rate}, reads host {can_read_host}: {worst}"
            );
        }
    }
}

#[test]
fn guest_that_reports_a_wrong_clock_gets_fewer_and_fewer_requests() {
    for lie in [50 * MILLISECOND, -3600 * SECOND, i64::MAX, i64::MIN] {
        for lead in [Some((lie, lie)), Some((lie.saturating_add(1), lie)), None] {
            let mut now = HostTime {
                raw: 0,
                real: EPOCH,
                uncertainty: MICROSECOND,
            };
            let mut controller = Controller::new(now);
            let mut requests = 0;
            while now.raw < 3600 * SECOND {
                let time = match controller.next(now, true) {
                    Step::Sleep(time) => time.as_nanos() as i64,
                    Step::Ask(request) => {
                        requests += 1;
                        let sent = now;
                        now.raw += MILLISECOND;
                        now.real += MILLISECOND;
                        let nanoseconds = now.real.saturating_add(lie);
                        controller.answered(request, sent, now, &ClockReading { nanoseconds, lead });
                        0
                    }
                };
                now.raw += time;
                now.real += time;
            }
            assert!(controller.is_failing(), "{lie} {lead:?}");
            assert!(requests < 300, "{lie} {lead:?}: {requests}");
        }
    }
}

#[test]
fn guest_that_refuses_gets_fewer_and_fewer_requests() {
    let mut now = HostTime {
        raw: 0,
        real: EPOCH,
        uncertainty: MICROSECOND,
    };
    let mut controller = Controller::new(now);
    let mut requests = 0;
    while now.raw < 3600 * SECOND {
        match controller.next(now, true) {
            Step::Sleep(time) => {
                now.raw += time.as_nanos() as i64;
                now.real += time.as_nanos() as i64;
            }
            Step::Ask(_) => {
                requests += 1;
                controller.refused(now);
            }
        }
    }
    assert!(controller.is_failing());
    assert!(requests < 100, "{requests} requests were sent");
}
