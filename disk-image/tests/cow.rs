//! Compares disks that have a copy-on-write file with a plain model, across kills, crashes of the host, and failures.

#![cfg(test)]

mod common;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex},
};

use common::Random;
use nutshell_disk_image::{Image, ReadAt, Storage};

const CLUSTER: usize = 64 << 10;
const SECTOR: usize = 512;

/// Not a multiple of a cluster, and larger than the 16 clusters that share a lock (`STRIPE_CLUSTERS`).
const DISK_SIZE: usize = 20 * CLUSTER + 3 * SECTOR;

fn base_bytes() -> Vec<u8> {
    let mut random = Random::new(7);
    let mut bytes = vec![0; DISK_SIZE];
    bytes.fill_with(|| random.next().to_le_bytes()[4] | 1);
    // A part that reads as zeroes.
    bytes[6 * CLUSTER..9 * CLUSTER + 1000].fill(0);
    bytes
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.size()).unwrap()];
    image.read(&mut &mut bytes[..], 0).unwrap();
    bytes
}

/// A change of a disk.
#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Zero { offset: usize, length: usize, unmap: bool },
}

impl Change {
    fn random(random: &mut Random) -> Self {
        let sectors = (DISK_SIZE / SECTOR) as u64;
        let start = random.below(sectors);
        // Mostly small changes, some of several clusters, some of whole clusters.
        let (start, count) = match random.below(4) {
            0 | 1 => (start, 1 + random.below(16)),
            2 => (start, 1 + random.below(600)),
            _ => (start / 128 * 128, 128 * (1 + random.below(4))),
        };
        let length = usize::try_from(count.min(sectors - start)).unwrap() * SECTOR;
        let offset = usize::try_from(start).unwrap() * SECTOR;
        match random.below(3) {
            0 => Self::Zero {
                offset,
                length,
                unmap: random.below(2) == 0,
            },
            _ => Self::Write {
                offset,
                bytes: vec![random.next().to_le_bytes()[1]; length],
            },
        }
    }

    fn apply(&self, image: &Image) -> io::Result<()> {
        match self {
            Self::Write { offset, bytes } => image.write(&mut &bytes[..], *offset as u64),
            Self::Zero { offset, length, unmap } => image.zero(*offset as u64, *length as u64, *unmap),
        }
    }

    fn apply_to_model(&self, model: &mut [u8]) {
        match self {
            Self::Write { offset, bytes } => model[*offset..offset + bytes.len()].copy_from_slice(bytes),
            Self::Zero { offset, length, .. } => model[*offset..offset + length].fill(0),
        }
    }

    fn sectors(&self) -> std::ops::Range<usize> {
        let (offset, length) = match self {
            Self::Write { offset, bytes } => (*offset, bytes.len()),
            Self::Zero { offset, length, .. } => (*offset, *length),
        };
        offset / SECTOR..(offset + length) / SECTOR
    }
}

/// A copy-on-write file in memory whose operations can fail, and that can lose what was not synced.
#[derive(Debug, Clone, Default)]
struct CowStorage(Arc<Mutex<CowStorageState>>);

#[derive(Debug, Default)]
struct CowStorageState {
    bytes: Vec<u8>,
    /// The content at the last sync.
    synced: Vec<u8>,
    /// The sectors that were written since the last sync.
    unsynced: BTreeSet<usize>,
    /// How many more changes reach the file. Only a part of the last one reaches it; that one and all later ones fail.
    /// `None` means unlimited.
    changes_left: Option<u64>,
    sync_fails: bool,
}

impl CowStorageState {
    fn change(&mut self, offset: u64, length: usize, byte_at: impl Fn(usize) -> u8) -> io::Result<()> {
        let mut done = length;
        match &mut self.changes_left {
            Some(0) => return Err(io::ErrorKind::StorageFull.into()),
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    done /= 2;
                }
            }
            None => {}
        }
        let offset = usize::try_from(offset).unwrap();
        assert!(offset + length <= self.bytes.len(), "a change outside of the file");
        for (index, byte) in self.bytes[offset..offset + done].iter_mut().enumerate() {
            *byte = byte_at(index);
        }
        self.unsynced.extend(offset / SECTOR..(offset + done).div_ceil(SECTOR));
        if done < length {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl CowStorage {
    fn state(&self) -> std::sync::MutexGuard<'_, CowStorageState> {
        self.0.lock().unwrap()
    }

    /// Crashes the host: any part of the sectors that were not synced has reached the disk.
    fn crash(&self, random: &mut Random) {
        let mut state = self.state();
        state.changes_left = None;
        let state = &mut *state;
        // With `kept` 0, no sector reaches the disk; with 4, each does.
        let kept = random.below(5);
        for sector in std::mem::take(&mut state.unsynced) {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(state.bytes.len());
            if random.below(4) < kept {
                state.synced[range.clone()].copy_from_slice(&state.bytes[range]);
            }
        }
        state.bytes = state.synced.clone();
    }
}

impl ReadAt for CowStorage {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.state().bytes.read_at(buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.state().bytes.size()
    }
}

impl Storage for CowStorage {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.state().change(offset, bytes.len(), |index| bytes[index])
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let size = usize::try_from(size).unwrap();
        let mut state = self.state();
        state.bytes.resize(size, 0);
        state.synced.resize(size, 0);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.state().change(offset, usize::try_from(length).unwrap(), |_| 0)
    }

    fn allocate(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.sync_fails || state.changes_left == Some(0) {
            return Err(io::Error::other("the device is gone"));
        }
        state.synced = state.bytes.clone();
        state.unsynced.clear();
        Ok(())
    }
}

fn open(base: &[u8], storage: &CowStorage, boot: u8) -> Image {
    Image::open(Box::new(base.to_vec()), Box::new(storage.clone()), [boot; 16]).unwrap()
}

#[test]
fn disk_on_a_file_equals_a_plain_disk_across_reopening_and_base_stays_unchanged() {
    let base = base_bytes();
    let folder = tempfile::tempdir().unwrap();
    let base_path = folder.path().join("base");
    let cow_path = folder.path().join("cow");
    fs::write(&base_path, &base).unwrap();
    let open = || {
        let cow = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&cow_path)
            .unwrap();
        // Only for reading: a write to it would fail.
        let base = File::open(&base_path).unwrap();
        Image::open(Box::new(base), Box::new(cow), [1; 16]).unwrap()
    };
    let mut random = Random::new(11);
    let mut model = base.clone();
    let mut image = open();
    for step in 0..200 {
        let change = Change::random(&mut random);
        change.apply(&image).unwrap();
        change.apply_to_model(&mut model);
        match random.below(12) {
            // A killed process: nothing is flushed.
            0 => image = open(),
            1 => image.flush().unwrap(),
            _ => {}
        }
        if step % 10 == 0 {
            assert!(read_all(&image) == model, "step {step}");
        }
    }
    drop(image);
    assert!(read_all(&open()) == model);
    assert!(fs::read(base_path).unwrap() == base);
}

#[test]
fn kill_in_the_middle_of_a_change_leaves_all_other_bytes_as_they_were() {
    let base = base_bytes();
    let mut random = Random::new(23);
    let storage = CowStorage::default();
    let mut model = base.clone();
    let mut image = open(&base, &storage, 1);
    let mut torn = 0;
    for step in 0..300 {
        let change = Change::random(&mut random);
        storage.state().changes_left = (random.below(3) == 0).then(|| random.below(5));
        let result = change.apply(&image);
        storage.state().changes_left = None;
        // The process is killed, or the guest gets an I/O error and continues.
        if random.below(2) == 0 {
            image = open(&base, &storage, 1);
        }
        let before = model.clone();
        change.apply_to_model(&mut model);
        let actual = read_all(&image);
        if result.is_ok() {
            assert!(actual == model, "step {step}: {change:?}");
            continue;
        }
        torn += 1;
        let changed = change.sectors();
        for sector in 0..DISK_SIZE / SECTOR {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            let (actual, old, new) = (&actual[range.clone()], &before[range.clone()], &model[range]);
            let is_valid = actual
                .iter()
                .zip(old.iter().zip(new))
                .all(|(byte, (old, new))| byte == old || changed.contains(&sector) && byte == new);
            assert!(is_valid, "step {step}, sector {sector}: {change:?}");
        }
        model = actual;
    }
    assert!(torn > 25, "only {torn} changes were interrupted");
}

#[test]
fn crash_of_the_host_loses_no_flushed_write_and_shows_no_byte_that_was_never_written() {
    let base = base_bytes();
    for seed in 0..12 {
        let mut random = Random::new(1000 + seed);
        let storage = CowStorage::default();
        let mut model = base.clone();
        for boot in 0..6 {
            let mut image = open(&base, &storage, boot);
            // The contents that a sector may have after a crash.
            let mut allowed: Vec<Vec<Vec<u8>>> = model.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect();
            assert!(read_all(&image) == model, "seed {seed}, boot {boot}");
            for _ in 0..random.below(25) {
                let change = Change::random(&mut random);
                change.apply(&image).unwrap();
                change.apply_to_model(&mut model);
                for sector in change.sectors() {
                    allowed[sector].push(model[sector * SECTOR..(sector + 1) * SECTOR].to_vec());
                }
                match random.below(8) {
                    0 => {
                        image.flush().unwrap();
                        allowed = model.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect();
                    }
                    1 => image = open(&base, &storage, boot),
                    _ => {}
                }
            }
            drop(image);
            storage.crash(&mut random);
            model = read_all(&open(&base, &storage, boot + 1));
            for (sector, actual) in model.chunks(SECTOR).enumerate() {
                assert!(
                    allowed[sector].iter().any(|content| content == actual),
                    "seed {seed}, boot {boot}, sector {sector}"
                );
            }
        }
    }
}

#[test]
fn flush_whose_sync_failed_is_never_reported_as_done_later() {
    let base = base_bytes();
    let storage = CowStorage::default();
    let image = open(&base, &storage, 1);
    image.write(&mut &[1; 512][..], 0).unwrap();
    storage.state().sync_fails = true;
    assert_eq!(image.flush().unwrap_err().to_string(), "the device is gone");
    storage.state().sync_fails = false;
    assert_eq!(
        image.flush().unwrap_err().to_string(),
        "an earlier flush failed: the device is gone"
    );
    // The next process continues with the contents of the file.
    let image = open(&base, &storage, 1);
    image.flush().unwrap();
    assert_eq!(read_all(&image)[..512], [1; 512]);
}

#[test]
fn flush_that_cannot_write_its_bitmap_can_be_repeated() {
    let base = base_bytes();
    let storage = CowStorage::default();
    let image = open(&base, &storage, 1);
    image.write(&mut &[1; 512][..], 0).unwrap();
    storage.state().changes_left = Some(1);
    assert_eq!(image.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
    storage.state().changes_left = None;
    image.flush().unwrap();
    drop(image);
    storage.crash(&mut Random::new(1));
    assert_eq!(read_all(&open(&base, &storage, 2))[..512], [1; 512]);
}

#[test]
fn discarded_clusters_are_holes_and_read_as_zeroes() {
    let base = base_bytes();
    let cow = tempfile::tempfile().unwrap();
    let open = || Image::open(Box::new(base.clone()), Box::new(cow.try_clone().unwrap()), [1; 16]).unwrap();
    let image = open();
    let blocks = || cow.metadata().unwrap().blocks() * 512;
    let empty = blocks();
    assert!(empty <= 64 << 10, "{empty} bytes are allocated for an unused disk");
    image.write(&mut &vec![1; 4 * CLUSTER][..], CLUSTER as u64).unwrap();
    assert!(blocks() >= empty + 4 * CLUSTER as u64);
    image.zero(CLUSTER as u64, 4 * CLUSTER as u64, true).unwrap();
    assert!(blocks() <= empty + CLUSTER as u64, "{}", blocks());
    // Neither the guest's old data nor that of the base image.
    for image in [image, open()] {
        let bytes = read_all(&image);
        assert!(bytes[CLUSTER..5 * CLUSTER].iter().all(|byte| *byte == 0));
        assert!(bytes[..CLUSTER] == base[..CLUSTER]);
    }
}

#[test]
fn part_of_a_cluster_with_zeroes_in_the_base_allocates_only_what_is_written() {
    let cow = tempfile::tempfile().unwrap();
    let image = Image::open(
        Box::new(vec![0; DISK_SIZE]),
        Box::new(cow.try_clone().unwrap()),
        [1; 16],
    )
    .unwrap();
    let before = cow.metadata().unwrap().blocks();
    image.write(&mut &[1; 4096][..], 3 * CLUSTER as u64 + 8192).unwrap();
    let allocated = (cow.metadata().unwrap().blocks() - before) * 512;
    assert!(allocated <= 8192, "{allocated} bytes are allocated for a write of 4096");
}

#[test]
fn queues_that_write_the_same_absent_cluster_at_the_same_time_lose_nothing() {
    let clusters = 400;
    let base = base_bytes().repeat(20)[..clusters * CLUSTER].to_vec();
    let cow = tempfile::tempfile().unwrap();
    let image = Image::open(Box::new(base.clone()), Box::new(cow), [1; 16]).unwrap();
    let threads = 4;
    let barrier = std::sync::Barrier::new(threads);
    let offset_of = |cluster: usize, thread: usize| cluster * CLUSTER + thread * 31 * SECTOR;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (image, barrier) = (&image, &barrier);
            scope.spawn(move || {
                for cluster in 0..clusters {
                    barrier.wait();
                    let offset = offset_of(cluster, thread) as u64;
                    image
                        .write(&mut &[0xf0 | u8::try_from(thread).unwrap(); SECTOR][..], offset)
                        .unwrap();
                    if cluster % 16 == thread {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    let mut expected = base;
    for (cluster, thread) in (0..clusters).flat_map(|cluster| (0..threads).map(move |thread| (cluster, thread))) {
        let offset = offset_of(cluster, thread);
        expected[offset..offset + SECTOR].fill(0xf0 | u8::try_from(thread).unwrap());
    }
    assert!(read_all(&image) == expected);
}

#[test]
fn file_that_does_not_belong_to_the_base_is_refused_with_field_and_value() {
    let base = base_bytes();
    let fresh = || {
        let storage = CowStorage::default();
        drop(open(&base, &storage, 1));
        storage
    };
    // The header follows the clusters. The last one of the 21 is incomplete on the disk.
    let header = 21 * CLUSTER;
    let refusal = |base: Vec<u8>, storage: &CowStorage| {
        let result = Image::open(Box::new(base), Box::new(storage.clone()), [1; 16]);
        result.map(|_| "not refused").unwrap_err().to_string()
    };
    let mut other_base = base.clone();
    other_base[100] ^= 1;
    let error = refusal(other_base, &fresh());
    assert!(
        error.starts_with("copy-on-write file: checksum of the base image's start is "),
        "{error}"
    );
    let error = refusal(base[..DISK_SIZE - SECTOR].to_vec(), &fresh());
    assert!(
        error.starts_with("copy-on-write file: disk size is 1312256 instead of 1311744"),
        "{error}"
    );
    let error = refusal(base[..DISK_SIZE / 2 / SECTOR * SECTOR].to_vec(), &fresh());
    assert!(error.contains("its size is "), "{error}");
    for (offset, byte, expected) in [
        (0, b'X', "its header starts with \"XUTSHCOW\" instead of \"NUTSHCOW\""),
        (8, 9, "version is 9 instead of 1"),
        (14, 2, "cluster size is 131072 instead of 65536"),
    ] {
        let storage = fresh();
        storage.state().bytes[header + offset] = byte;
        let error = refusal(base.clone(), &storage);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn file_without_header_is_used_as_if_it_were_new() {
    let base = base_bytes();
    let storage = CowStorage::default();
    drop(open(&base, &storage, 1));
    // The process that made the file was killed before it wrote the header; or the host crashed when only parts of the
    // bitmaps and of the data were on the disk.
    // The header follows the 21 clusters.
    let header = 21 * CLUSTER;
    let end = storage.state().bytes.len();
    storage.state().bytes[header..header + 4096].fill(0);
    storage.state().bytes[header + 4096..end].fill(0xff);
    assert!(read_all(&open(&base, &storage, 1)) == base);
    assert!(read_all(&open(&base, &storage, 1)) == base);
}

#[test]
fn read_only_image_refuses_changes() {
    let image = Image::open_read_only(Box::new(base_bytes())).unwrap();
    assert!(image.is_read_only());
    assert_eq!(
        image.write(&mut &[0; 512][..], 0).unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    assert_eq!(
        image.zero(0, 512, true).unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    image.flush().unwrap();
}

#[test]
fn access_outside_of_the_disk_fails() {
    let image = open(&base_bytes(), &CowStorage::default(), 1);
    for offset in [DISK_SIZE as u64 - 511, DISK_SIZE as u64, u64::MAX - 511, u64::MAX] {
        assert!(image.read(&mut &mut [0; 512][..], offset).is_err(), "{offset}");
        assert!(image.write(&mut &[0; 512][..], offset).is_err(), "{offset}");
        assert!(image.zero(offset, 512, true).is_err(), "{offset}");
    }
}

#[test]
fn full_file_system_is_an_error_and_leaves_a_consistent_disk() {
    let base = base_bytes();
    let storage = CowStorage::default();
    let image = open(&base, &storage, 1);
    image.write(&mut &[1; 512][..], 512).unwrap();
    storage.state().changes_left = Some(0);
    let error = image.write(&mut &vec![2; 300_000][..], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    storage.state().changes_left = None;
    let mut expected = base;
    expected[512..1024].fill(1);
    // The first cluster is in the file already, so the write may have changed a part of it. The others must read as
    // before.
    assert!(read_all(&image)[CLUSTER..] == expected[CLUSTER..]);
    image.write(&mut &vec![2; 300_000][..], 0).unwrap();
    expected[..300_000].fill(2);
    assert!(read_all(&image) == expected);
}
