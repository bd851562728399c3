//! Finds queues and streams that are not served for a while, and reports them once. The event loop calls it when the
//! stall timer expires, which only runs while something waits.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::devices::counters::{Counters, Pending};

/// How long a queue or stream makes no progress before it is reported.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// How a stall ends, unless its device is removed.
const PROGRESS: &str = "it makes progress again";

/// The queues and streams that waited at the last check, by device and place.
#[derive(Debug, Default)]
pub(super) struct StallWatch {
    suspects: HashMap<(String, String), Suspect>,
}

#[derive(Debug)]
struct Suspect {
    /// The device. Another one may have its name later.
    device: Arc<Counters>,
    progress: u64,
    /// The time of the check that first found this value of `progress`.
    since: Instant,
    reported: bool,
}

impl StallWatch {
    /// Checks `devices`, each with its waiting queues and streams. Returns `true` if any waits: then check again later.
    pub(super) fn check(&mut self, devices: Vec<(Arc<Counters>, Vec<Pending>)>, now: Instant) -> bool {
        let mut previous = std::mem::take(&mut self.suspects);
        previous.retain(|key, suspect| {
            let is_present = devices
                .iter()
                .any(|(counters, _)| Arc::ptr_eq(counters, &suspect.device));
            if !is_present {
                suspect.report_end(key, "the device was removed", now);
            }
            is_present
        });
        for (counters, pending) in devices {
            for Pending {
                place,
                progress,
                reason,
            } in pending
            {
                let key = (counters.name().to_owned(), place);
                let mut suspect = match previous.remove(&key) {
                    Some(suspect) if suspect.progress == progress => suspect,
                    before => {
                        if let Some(before) = before {
                            before.report_end(&key, PROGRESS, now);
                        }
                        Suspect {
                            device: counters.clone(),
                            progress,
                            since: now,
                            reported: false,
                        }
                    }
                };
                let waited = now.duration_since(suspect.since);
                if waited >= STALL_LIMIT && !suspect.reported {
                    suspect.reported = true;
                    counters.add_stall();
                    log::warn!(
                        target: counters.name(),
                        "{}: no progress for {} s: {reason}",
                        key.1,
                        waited.as_secs()
                    );
                }
                self.suspects.insert(key, suspect);
            }
        }
        for (key, suspect) in previous {
            suspect.report_end(&key, PROGRESS, now);
        }
        !self.suspects.is_empty()
    }
}

impl Suspect {
    /// Logs the end of the stall, if it was reported.
    fn report_end(&self, (device, place): &(String, String), end: &str, now: Instant) {
        if self.reported {
            let seconds = now.duration_since(self.since).as_secs();
            log::warn!(target: device.as_str(), "{place}: {end} after {seconds} s");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{log_capture::LogCapture, stall_timer::StallTimer};

    #[test]
    fn stall_is_reported_once_and_so_is_its_end() {
        let timer = Arc::new(StallTimer::new().unwrap());
        let disk = Counters::with_queues("stalled-disk", 2, &timer);
        let log = LogCapture::start("stalled-disk");
        let (mut watch, start) = (StallWatch::default(), Instant::now());
        let mut check = |seconds, progress: Option<u64>| {
            let pending = progress.map(|progress| Pending {
                place: "queue 1".to_owned(),
                progress,
                reason: "a write does not return".to_owned(),
            });
            let devices = vec![(disk.clone(), pending.into_iter().collect())];
            watch.check(devices, start + Duration::from_secs(seconds))
        };

        // Progress restarts the time.
        assert!(check(0, Some(1)) && check(5, Some(3)) && check(10, Some(3)));
        assert_eq!(log.lines(), Vec::<String>::new());
        assert!(check(15, Some(3)) && check(20, Some(3)));
        assert_eq!(log.lines(), ["queue 1: no progress for 10 s: a write does not return"]);
        assert_eq!(disk.read().stalls, 1);

        assert!(!check(25, None), "nothing waits");
        assert_eq!(log.lines()[1..], ["queue 1: it makes progress again after 20 s"]);

        // A wait that ends in time is not reported.
        assert!(check(30, Some(5)) && !check(39, None));
        assert_eq!(log.lines().len(), 2);
    }

    #[test]
    fn stalled_disk_that_is_unplugged_has_not_recovered() {
        let timer = Arc::new(StallTimer::new().unwrap());
        let new_disk = || Counters::with_queues("unplugged-disk", 1, &timer);
        let log = LogCapture::start("unplugged-disk");
        let (mut watch, start) = (StallWatch::default(), Instant::now());
        let mut check = |seconds, disk: Option<&Arc<Counters>>| {
            let pending = Pending {
                place: "queue 0".to_owned(),
                progress: 1,
                reason: "a write does not return".to_owned(),
            };
            let devices = disk.map(|disk| (disk.clone(), vec![pending]));
            watch.check(devices.into_iter().collect(), start + Duration::from_secs(seconds))
        };
        let (first, second, third) = (new_disk(), new_disk(), new_disk());
        assert!(check(0, Some(&first)) && check(10, Some(&first)));

        // Another disk in the same slot is not the one that stalled.
        assert!(check(15, Some(&second)) && check(20, Some(&second)));
        assert_eq!(log.lines().len(), 2, "{:?}", log.lines());
        assert!(check(25, Some(&second)) && check(30, Some(&third)));
        assert!(check(45, Some(&third)) && !check(50, None));

        let removed = |seconds| format!("queue 0: the device was removed after {seconds} s");
        let stalled = |seconds| format!("queue 0: no progress for {seconds} s: a write does not return");
        assert_eq!(
            log.lines(),
            [
                stalled(10),
                removed(15),
                stalled(10),
                removed(15),
                stalled(15),
                removed(20)
            ]
        );
    }
}
