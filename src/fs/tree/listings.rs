//! Directory entries that were read from the host, but for which the reply to the guest had no space.
//!
//! The guest reads on after the last entry that it received, but the host's descriptor is already after all entries that
//! were read. Seeking back is wrong on file systems where a position is the index of an entry, such as tmpfs before
//! Linux 6.6: if the guest has removed entries meanwhile, the remaining ones have moved to lower indexes, and the seek
//! skips some of them. So the entries without space are kept for the next request, and the descriptor moves only if the
//! guest itself seeks.

use std::{cell::Cell, collections::BTreeMap, ffi::CString, io, mem, sync::Arc};

use parking_lot::Mutex;
use virtiofsd::{
    filesystem::{DirEntry, DirectoryIterator},
    read_dir::ReadDir,
};

/// How many bytes of a directory are read from the host at a time (getdents64(2)). The largest entry is 280 bytes.
pub(super) const MAX_READ_SIZE: u32 = 4096;

/// Maximum number of open directories whose entries are kept. If there are more, the entries of the directory that was
/// opened first are dropped. Its next read seeks back to the guest's position, which may skip entries on such a file
/// system.
const MAX_KEPT_LISTINGS: usize = 256;

thread_local! {
    /// Whether this thread is building a READDIRPLUS reply from a [`Listing`].
    static IS_LISTING: Cell<bool> = const { Cell::new(false) };
}

/// The entries that remain of each open directory, by its handle. Handles are numbered in the order of their opening.
#[derive(Debug, Default)]
pub(super) struct Listings {
    kept: Mutex<BTreeMap<u64, Entries>>,
}

impl Listings {
    /// Returns the entries of the open directory `handle` after the position `offset`. `read` reads a directory from
    /// a position, at most [`MAX_READ_SIZE`] bytes. No entries mean that the directory has ended.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub(super) fn continue_at(
        self: &Arc<Self>,
        handle: u64,
        offset: u64,
        read: impl FnOnce(u64) -> io::Result<ReadDir<Vec<u8>>>,
    ) -> io::Result<Listing> {
        let kept = self.kept.lock().remove(&handle);
        let remaining = kept.and_then(|entries| entries.after(offset));
        let entries = match remaining {
            Some(entries) => entries,
            None => Entries::copy(offset, read(offset)?),
        };
        IS_LISTING.set(true);
        Ok(Listing {
            listings: self.clone(),
            handle,
            entries,
        })
    }

    /// Drops the entries of a directory that is closed.
    pub(super) fn remove(&self, handle: u64) {
        self.kept.lock().remove(&handle);
    }

    pub(super) fn clear(&self) {
        self.kept.lock().clear();
    }

    fn keep(&self, handle: u64, entries: Entries) {
        let mut kept = self.kept.lock();
        kept.insert(handle, entries);
        if kept.len() > MAX_KEPT_LISTINGS {
            kept.pop_first();
        }
    }
}

/// Whether this thread is building a READDIRPLUS reply. virtiofsd then calls `lookup` for each entry, and a failure there
/// must not fail the whole reply (`Tree::complete_entry`).
pub(super) fn is_listing() -> bool {
    IS_LISTING.get()
}

/// The entries for one reply. Those that the reply does not consume are kept for the next one.
#[derive(Debug)]
pub(in crate::fs) struct Listing {
    listings: Arc<Listings>,
    handle: u64,
    entries: Entries,
}

impl DirectoryIterator for Listing {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        self.entries.next()
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        IS_LISTING.set(false);
        // Only a returned `None` shows that the reply had space for the last entry. Otherwise the entries are kept: the
        // guest may ask for the last one again.
        if !self.entries.is_consumed {
            self.listings.keep(self.handle, mem::take(&mut self.entries));
        }
    }
}

/// Consecutive entries of a directory.
#[derive(Debug, Default)]
struct Entries {
    /// The position after which the entries begin.
    start: u64,
    entries: Vec<StoredEntry>,
    /// The index of the entry that [`Self::next`] returns.
    next: usize,
    /// Whether [`Self::next`] has returned all entries, and then `None`.
    is_consumed: bool,
}

/// A copy of a [`DirEntry`].
#[derive(Debug)]
struct StoredEntry {
    ino: u64,
    /// The position after this entry.
    offset: u64,
    type_: u32,
    name: CString,
}

impl Entries {
    fn copy(start: u64, mut read: ReadDir<Vec<u8>>) -> Self {
        let mut entries = Vec::new();
        while let Some(entry) = DirectoryIterator::next(&mut read) {
            entries.push(StoredEntry {
                ino: entry.ino,
                offset: entry.offset,
                type_: entry.type_,
                name: entry.name.to_owned(),
            });
        }
        Self {
            start,
            entries,
            ..Self::default()
        }
    }

    /// The stored entries after the position `offset`. `None` if there are none, if `offset` is not a position of a stored
    /// entry, or if it is 0: after rewinddir(3), the guest expects the current entries.
    fn after(mut self, offset: u64) -> Option<Self> {
        self.next = match offset {
            0 => return None,
            _ if offset == self.start => 0,
            _ => self.entries.iter().position(|entry| entry.offset == offset)? + 1,
        };
        (self.next < self.entries.len()).then_some(self)
    }

    fn next(&mut self) -> Option<DirEntry<'_>> {
        let Some(entry) = self.entries.get(self.next) else {
            self.is_consumed = true;
            return None;
        };
        self.next += 1;
        Some(DirEntry {
            ino: entry.ino,
            offset: entry.offset,
            type_: entry.type_,
            name: &entry.name,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeSet, fs, fs::File, path::Path};

    use super::*;

    fn directory_with_files(count: usize) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..count {
            fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
        }
        directory
    }

    /// Takes `count` entries as a reply without space for more does. Returns their names and the last one's position.
    fn reply(mut listing: Listing, count: usize) -> Option<(Vec<String>, u64)> {
        let mut names = Vec::new();
        let mut position = None;
        while let Some(entry) = listing.next() {
            // This is the entry for which the reply has no space.
            if names.len() == count {
                break;
            }
            position = Some(entry.offset);
            names.push(entry.name.to_str().unwrap().to_owned());
        }
        position.map(|position| (names, position))
    }

    /// Lists a directory in replies of `count` entries, and removes each file that it has seen. Returns the names.
    fn list_and_remove(directory: &Path, count: usize) -> BTreeSet<String> {
        let opened = File::open(directory).unwrap();
        let listings = Arc::new(Listings::default());
        let read = |offset| ReadDir::new(&opened, offset, vec![0; 512]);
        let (mut seen, mut offset) = (BTreeSet::new(), 0);
        while let Some((names, position)) = reply(listings.continue_at(1, offset, read).unwrap(), count) {
            for name in names.iter().filter(|name| name.starts_with("file")) {
                fs::remove_file(directory.join(name)).unwrap();
            }
            seen.extend(names);
            offset = position;
        }
        seen
    }

    #[test]
    fn directory_is_listed_completely_while_its_files_are_removed() {
        for count in [1, 3, 7, 100] {
            let directory = directory_with_files(100);
            let seen = list_and_remove(directory.path(), count);
            assert_eq!(seen.len(), 100 + 2, "replies of {count}");
            fs::remove_dir(directory.path()).unwrap();
        }
    }

    #[test]
    fn reads_continue_where_the_descriptor_is() {
        // Expected: each read starts at the position after the last entry of the read before, so that the descriptor is
        // never moved back.
        let directory = directory_with_files(100);
        let opened = File::open(directory.path()).unwrap();
        let mut positions = vec![0];
        loop {
            let entries = Entries::copy(
                0,
                ReadDir::new(&opened, *positions.last().unwrap(), vec![0; 512]).unwrap(),
            );
            match entries.entries.last() {
                Some(last) => positions.push(last.offset),
                None => break,
            }
        }
        drop(opened);
        let listed = |count| {
            let (opened, listings) = (File::open(directory.path()).unwrap(), Arc::new(Listings::default()));
            let reads = RefCell::new(Vec::new());
            let read = |offset| {
                reads.borrow_mut().push(offset);
                ReadDir::new(&opened, offset, vec![0; 512])
            };
            let mut offset = 0;
            while let Some((_, position)) = reply(listings.continue_at(1, offset, read).unwrap(), count) {
                offset = position;
            }
            reads.into_inner()
        };
        for count in [1, 3, 7, 100] {
            assert_eq!(listed(count), positions, "replies of {count}");
        }
    }

    #[test]
    fn directory_that_is_rewound_is_read_again() {
        let directory = directory_with_files(5);
        let opened = File::open(directory.path()).unwrap();
        let listings = Arc::new(Listings::default());
        let names = |offset| {
            let read = |offset| ReadDir::new(&opened, offset, vec![0; 4096]);
            reply(listings.continue_at(1, offset, read).unwrap(), 2).unwrap()
        };
        let (_, position) = names(0);
        let (second, _) = names(position);
        let (again, _) = names(position);
        assert_eq!(second, again, "reading twice at one position gives the same entries");
        fs::write(directory.path().join("new"), "").unwrap();
        let (mut all, mut offset) = names(0);
        while all.len() < 8 {
            let (more, position) = names(offset);
            all.extend(more);
            offset = position;
        }
        assert!(all.contains(&"new".to_owned()), "{all:?}");
    }

    #[test]
    fn only_the_directories_opened_last_keep_entries() {
        let directory = directory_with_files(5);
        let listings = Arc::new(Listings::default());
        let handles = 2 * u64::try_from(MAX_KEPT_LISTINGS).unwrap();
        for handle in 0..handles {
            let opened = File::open(directory.path()).unwrap();
            let listing = listings.continue_at(handle, 0, |offset| ReadDir::new(&opened, offset, vec![0; 4096]));
            reply(listing.unwrap(), 2).unwrap();
        }
        assert_eq!(listings.kept.lock().len(), MAX_KEPT_LISTINGS);
        assert!(listings.kept.lock().contains_key(&(handles - 1)));
        listings.remove(handles - 1);
        assert!(!listings.kept.lock().contains_key(&(handles - 1)));
    }
}
