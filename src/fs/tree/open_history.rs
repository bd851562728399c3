//! Remembers the attributes that files had at their last open. The guest may keep its cached contents of a file whose
//! attributes are unchanged: close-to-open consistency without reading everything again.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use virtiofsd::fuse::Attr;

/// Number of remembered files. The low bits of a node id select the slot; a new file replaces the one in its slot.
const SLOTS: usize = 4096;

/// A file whose last change is more recent than this counts as changed: a second change within one tick of the file
/// system's clock would leave the attributes equal. FAT has the longest tick, two seconds.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    /// 0 in an empty slot: no node has this id.
    node: u64,
    fingerprint: u64,
}

/// The files that were opened last, in a fixed amount of memory.
#[derive(Debug)]
pub(super) struct OpenHistory {
    slots: Mutex<Vec<Slot>>,
}

impl Default for OpenHistory {
    fn default() -> Self {
        Self {
            slots: Mutex::new(vec![Slot::default(); SLOTS]),
        }
    }
}

impl OpenHistory {
    /// Records an open of the file `node`. Returns whether the file certainly has not changed since its last open.
    /// Node ids are never reused.
    pub(super) fn record(&self, node: u64, attr: &Attr) -> bool {
        self.record_at(SystemTime::now(), node, attr)
    }

    fn record_at(&self, now: SystemTime, node: u64, attr: &Attr) -> bool {
        let is_settled = UNIX_EPOCH
            .checked_add(Duration::from_secs(attr.ctime))
            .and_then(|changed| now.duration_since(changed).ok())
            .is_some_and(|age| age > SETTLED_AFTER);
        let current = Slot {
            node: if is_settled { node } else { 0 },
            fingerprint: fingerprint(attr),
        };
        let mut slots = self.slots.lock();
        let slot = &mut slots[usize::try_from(node % SLOTS as u64).expect("less than SLOTS")];
        std::mem::replace(slot, current) == current && is_settled
    }
}

fn fingerprint(attr: &Attr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (attr.size, attr.mtime, attr.mtimensec, attr.ctime, attr.ctimensec).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn file(ctime: u64, size: u64) -> Attr {
        Attr {
            ctime,
            size,
            ..Attr::default()
        }
    }

    #[test]
    fn file_is_unchanged_only_with_the_attributes_of_its_last_open() {
        let history = OpenHistory::default();
        let old = file(NOW - 100, 1);
        let is_unchanged = |node, attr: &Attr| history.record_at(at(NOW), node, attr);
        assert!(!is_unchanged(2, &old), "first open");
        assert!(is_unchanged(2, &old), "second open");
        assert!(!is_unchanged(2, &file(NOW - 100, 2)), "other size");
        assert!(!is_unchanged(2, &file(NOW - 50, 2)), "other time");
        assert!(is_unchanged(2, &file(NOW - 50, 2)), "again");
        assert!(!is_unchanged(2 + SLOTS as u64, &file(NOW - 50, 2)), "another file");
        assert!(!is_unchanged(2, &file(NOW - 50, 2)), "its slot was reused");
    }

    #[test]
    fn file_that_changed_just_before_an_open_counts_as_changed() {
        let history = OpenHistory::default();
        for ctime in [NOW, NOW - 2, NOW + 5, u64::MAX] {
            assert!(!history.record_at(at(NOW), 7, &file(ctime, 1)), "{ctime}");
            assert!(!history.record_at(at(NOW), 7, &file(ctime, 1)), "{ctime}");
        }
        assert!(!history.record_at(at(NOW + 1), 7, &file(NOW, 1)));
        assert!(!history.record_at(at(NOW + 3), 7, &file(NOW, 1)), "first settled open");
        assert!(history.record_at(at(NOW + 4), 7, &file(NOW, 1)));
    }
}
