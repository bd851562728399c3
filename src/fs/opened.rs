//! What files looked like when they were last opened, so that the guest may keep what it has cached
//! of those that are unchanged: close-to-open consistency without reading everything again.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use virtiofsd::fuse::Attr;

/// How many files are remembered. Files share a place by their number's last bits; who comes later
/// has it.
const REMEMBERED_FILES: usize = 4096;

/// A file that changes twice within one step of the file system's clock looks unchanged after the
/// second time, so what was seen this close to a change proves nothing. Two seconds: FAT's step.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    node: u64,
    look: u64,
}

/// The looks of the files opened last, in a fixed amount of memory.
#[derive(Debug)]
pub(super) struct Opened {
    places: Mutex<Vec<Seen>>,
}

impl Default for Opened {
    fn default() -> Self {
        Self {
            places: Mutex::new(vec![Seen::default(); REMEMBERED_FILES]),
        }
    }
}

impl Opened {
    /// Whether file `node` certainly is as it was when this was asked last. Node numbers are never
    /// used twice.
    pub(super) fn is_unchanged(&self, node: u64, attr: &Attr) -> bool {
        self.is_unchanged_at(SystemTime::now(), node, attr)
    }

    fn is_unchanged_at(&self, now: SystemTime, node: u64, attr: &Attr) -> bool {
        let settled = UNIX_EPOCH
            .checked_add(Duration::from_secs(attr.ctime))
            .and_then(|changed| now.duration_since(changed).ok())
            .is_some_and(|age| age > SETTLED_AFTER);
        let seen = Seen {
            node: if settled { node } else { 0 },
            look: look(attr),
        };
        let mut places = self.places.lock();
        let place = &mut places[usize::try_from(node % REMEMBERED_FILES as u64).expect("less than REMEMBERED_FILES")];
        std::mem::replace(place, seen) == seen && settled
    }
}

fn look(attr: &Attr) -> u64 {
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
    fn file_is_unchanged_only_where_it_was_seen_before_as_it_is() {
        let opened = Opened::default();
        let old = file(NOW - 100, 1);
        let ask = |node, attr: &Attr| opened.is_unchanged_at(at(NOW), node, attr);
        assert!(!ask(2, &old), "first");
        assert!(ask(2, &old), "second");
        assert!(!ask(2, &file(NOW - 100, 2)), "other size");
        assert!(!ask(2, &file(NOW - 50, 2)), "other time");
        assert!(ask(2, &file(NOW - 50, 2)), "again");
        assert!(!ask(2 + REMEMBERED_FILES as u64, &file(NOW - 50, 2)), "another file");
        assert!(!ask(2, &file(NOW - 50, 2)), "its place was taken");
    }

    #[test]
    fn file_that_changed_just_before_it_was_seen_proves_nothing() {
        let opened = Opened::default();
        for ctime in [NOW, NOW - 2, NOW + 5, u64::MAX] {
            assert!(!opened.is_unchanged_at(at(NOW), 7, &file(ctime, 1)), "{ctime}");
            assert!(!opened.is_unchanged_at(at(NOW), 7, &file(ctime, 1)), "{ctime}");
        }
        assert!(!opened.is_unchanged_at(at(NOW + 1), 7, &file(NOW, 1)));
        assert!(
            !opened.is_unchanged_at(at(NOW + 3), 7, &file(NOW, 1)),
            "first seen settled"
        );
        assert!(opened.is_unchanged_at(at(NOW + 4), 7, &file(NOW, 1)));
    }
}
