//! Waits for states that send no notification.

use std::time::{Duration, Instant};

/// The interval between two checks.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Time limit of a wait. The lab is emulated and slow; nothing takes this long unless it hangs.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// Calls `check` until it returns a value, and returns the value. Panics with `what` in the message after [`TIMEOUT`].
pub(crate) fn wait_until<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    wait_until_within(what, TIMEOUT, check)
}

/// Like [`wait_until`], but with another time limit.
pub(crate) fn wait_until_within<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(POLL_INTERVAL);
    }
}
