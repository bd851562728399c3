//! A limit for log messages that a guest can cause.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Admits a burst of messages of each kind, and after that one per interval.
#[derive(Debug)]
pub(crate) struct RateLimit<K> {
    burst: u32,
    interval: Duration,
    kinds: HashMap<K, Budget>,
}

#[derive(Debug)]
struct Budget {
    left: u32,
    /// When `left` was last increased.
    refilled: Instant,
    suppressed: u64,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// Creates a limit. There must be few kinds: each occupies memory until the limit is dropped.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            kinds: HashMap::new(),
        }
    }

    /// Returns `None` if a message of this kind must be suppressed. Otherwise, returns how many of its kind were
    /// suppressed since the last one that was admitted.
    pub(crate) fn admit(&mut self, kind: K, now: Instant) -> Option<u64> {
        let budget = self.kinds.entry(kind).or_insert(Budget {
            left: self.burst,
            refilled: now,
            suppressed: 0,
        });
        let intervals = now.duration_since(budget.refilled).as_nanos() / self.interval.as_nanos().max(1);
        if intervals > 0 {
            let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
            budget.left = budget.left.saturating_add(intervals).min(self.burst);
            budget.refilled = now;
        }
        match budget.left.checked_sub(1) {
            Some(left) => {
                budget.left = left;
                Some(std::mem::take(&mut budget.suppressed))
            }
            None => {
                budget.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_admitted_and_then_one_message_per_interval() {
        let mut limit = RateLimit::new(3, Duration::from_secs(10));
        let start = Instant::now();
        let mut at = |seconds| limit.admit("kind", start + Duration::from_secs(seconds));
        assert_eq!(
            [at(0), at(0), at(1), at(2), at(9)],
            [Some(0), Some(0), Some(0), None, None]
        );
        assert_eq!([at(10), at(11)], [Some(2), None]);
        // After a pause, a burst again.
        assert_eq!([at(100), at(100), at(100), at(100)], [Some(1), Some(0), Some(0), None]);
    }

    #[test]
    fn kinds_are_limited_separately() {
        let mut limit = RateLimit::new(1, Duration::from_secs(10));
        let now = Instant::now();
        assert_eq!(limit.admit("a", now), Some(0));
        assert_eq!(limit.admit("a", now), None);
        assert_eq!(limit.admit("b", now), Some(0));
    }
}
