//! The power management timer of ACPI (ACPI 6.5 §4.8.3.3), with 32 bits. A guest without KVM's clock calibrates its TSC
//! by it.

use std::time::{Duration, Instant};

use crate::devices::bus::Registers;

/// The frequency of the timer in Hz.
const FREQUENCY: u128 = 3_579_545;
const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

#[derive(Debug)]
pub(crate) struct PmTimer {
    /// When the timer was 0, on CLOCK_MONOTONIC.
    start: Instant,
}

impl PmTimer {
    /// A timer that starts at 0.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Registers for PmTimer {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = ticks(self.start.elapsed());
        // `data` has the results of several reads if the guest used a repeated string instruction (REP INS): KVM reports
        // them as one access. So the bytes of the register repeat.
        for (byte, index) in data.iter_mut().zip(offset..) {
            let [first, second, third, fourth] = value;
            *byte = match index % 4 {
                0 => first,
                1 => second,
                2 => third,
                _ => fourth,
            };
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// The value of the timer after `elapsed`, least significant byte first. It wraps after 20 minutes.
fn ticks(elapsed: Duration) -> [u8; 4] {
    let ticks = elapsed.as_nanos() * FREQUENCY / NANOSECONDS_PER_SECOND;
    let [first, second, third, fourth, ..] = ticks.to_le_bytes();
    [first, second, third, fourth]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timer_counts_3579545_ticks_a_second_and_wraps_at_32_bits() {
        let cases = [
            (Duration::ZERO, 0),
            (Duration::from_nanos(279), 0),
            (Duration::from_nanos(280), 1),
            (Duration::from_secs(1), 3_579_545),
            (Duration::from_secs(1199), 4_291_874_455),
            (Duration::from_nanos(1_199_864_031_881), u32::MAX),
            (Duration::from_nanos(1_199_864_031_882), 0),
            // A million days.
            (Duration::from_secs(86_400_000_000), 49_831_936),
        ];
        for (elapsed, expected) in cases {
            assert_eq!(u32::from_le_bytes(ticks(elapsed)), expected, "{elapsed:?}");
        }
    }

    #[test]
    fn register_advances_with_the_monotonic_clock() {
        let mut timer = PmTimer::new();
        timer.start -= Duration::from_secs(100);
        let mut read = |offset, data: &mut [u8]| timer.read(offset, data);
        let mut first = [0; 4];
        read(0, &mut first);
        let mut second = [0; 8];
        read(0, &mut second);

        let value = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        assert!((357_954_500..357_954_500 * 2).contains(&value(&first)), "{first:?}");
        assert!(value(&second[..4]) >= value(&first));
        assert_eq!(second[..4], second[4..]);
        let mut byte = [0];
        read(3, &mut byte);
        assert_eq!(byte[0], second[3]);
    }
}
