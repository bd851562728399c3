//! Copy-on-write files, compared with a disk in memory.

use arbitrary::{Result, Unstructured};

use super::storage::MemoryFile;
use crate::{Image, SECTOR_SIZE};

/// The size of a cluster of a copy-on-write file in bytes.
const CLUSTER: usize = 64 << 10;

/// The maximum number of clusters of the disk: more than those that share a lock.
const MAX_CLUSTERS: usize = 18;

/// The maximum number of operations. Each has its own value to write.
const MAX_OPERATIONS: usize = 40;

const BOOT: [u8; 16] = [1; 16];

/// A disk, and what it must contain.
struct Disk {
    image: Image,
    base: MemoryFile,
    cow: MemoryFile,
    boot: [u8; 16],
    expected: Vec<u8>,
    /// The clusters that were written or zeroed, and those of them that a flush has made durable. A raw base has no
    /// unallocated clusters, so that each of these is present in the file.
    present: Vec<bool>,
    durable: Vec<bool>,
    /// Whether a flush failed.
    has_failed: bool,
}

/// Interprets `data` as the size of a disk and operations on it: reads, writes, discards, flushes, failures of the
/// host's file system, and new processes after an end of the process or of the host.
///
/// # Panics
///
/// If the disk has other bytes than a model of it.
pub fn change_disk(data: &[u8]) {
    // The input may end anywhere.
    let _ = run(&mut Unstructured::new(data));
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let sector = usize::try_from(SECTOR_SIZE).unwrap();
    let last = [sector, CLUSTER - sector, CLUSTER, CLUSTER / 2];
    let size = input.int_in_range(0..=MAX_CLUSTERS - 1)? * CLUSTER + input.choose(&last)?;
    let mut disk = Disk::new(size);
    for step in 0..MAX_OPERATIONS {
        if input.is_empty() {
            break;
        }
        disk.step(input, u8::try_from(step).unwrap())?;
    }
    disk.compare(0, size);
    disk.restart(disk.boot);
    disk.compare(0, size);
    Ok(())
}

impl Disk {
    fn new(size: usize) -> Self {
        // Every third cluster has zeroes.
        let mut base = vec![0; size];
        for (cluster, bytes) in base
            .chunks_mut(CLUSTER)
            .enumerate()
            .filter(|(number, _)| number % 3 < 2)
        {
            bytes.fill(0x80 | u8::try_from(cluster).unwrap());
        }
        let base = MemoryFile::from_bytes(base);
        let cow = MemoryFile::default();
        let clusters = size.div_ceil(CLUSTER);
        Self {
            image: open(&base, &cow, BOOT),
            expected: base.content(),
            base,
            cow,
            boot: BOOT,
            present: vec![false; clusters],
            durable: vec![false; clusters],
            has_failed: false,
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>, number: u8) -> Result<()> {
        match input.int_in_range(0..=9_u8)? {
            0..=3 => {
                let (start, end) = self.range(input)?;
                let bytes = vec![number + 1; end - start];
                let result = self.image.write(&mut &bytes[..], start as u64);
                self.set(start, end, number + 1, result.is_ok());
            }
            4 | 5 => {
                let (start, end) = self.range(input)?;
                let unmap = input.arbitrary()?;
                let result = self.image.zero(start as u64, (end - start) as u64, unmap);
                self.set(start, end, 0, result.is_ok());
            }
            6 => {
                let result = self.image.flush();
                assert!(!(self.has_failed && result.is_ok()), "flush succeeds after a failure");
                if result.is_ok() {
                    self.durable.clone_from(&self.present);
                } else {
                    // The durable bitmap may have some of the bits, so after a crash each cluster has one content or
                    // the other. A flush can be repeated after a failed write of the bitmap, not after a failed sync.
                    self.has_failed = self.image.flush().is_err();
                    if !self.has_failed {
                        self.durable.clone_from(&self.present);
                    }
                }
            }
            7 => self.cow.fail_after(Some(u32::from(input.int_in_range(0..=7_u8)?))),
            8 => self.restart(self.boot),
            _ => self.restart(self.boot.map(|byte| byte.wrapping_add(1))),
        }
        Ok(())
    }

    /// A range inside of the disk, near the borders of clusters or anywhere.
    fn range(&self, input: &mut Unstructured<'_>) -> Result<(usize, usize)> {
        let size = self.expected.len();
        let mut position = || {
            Ok(match input.arbitrary::<bool>()? {
                true => (usize::from(input.arbitrary::<u8>()?) % (MAX_CLUSTERS + 1) * CLUSTER).min(size),
                false => input.int_in_range(0..=size)?,
            })
        };
        let (one, other) = (position()?, position()?);
        Ok((one.min(other), one.max(other)))
    }

    /// Sets the expected content of a range after a change. A change that failed may have changed any part of the
    /// range.
    fn set(&mut self, start: usize, end: usize, value: u8, succeeded: bool) {
        if succeeded {
            self.expected[start..end].fill(value);
            if start < end {
                self.present[start / CLUSTER..end.div_ceil(CLUSTER)].fill(true);
            }
            let neighbours = start.saturating_sub(CLUSTER)..(end + CLUSTER).min(self.expected.len());
            self.compare(neighbours.start, neighbours.end);
            return;
        }
        let found = self.read(start, end);
        for (expected, found) in self.expected[start..end].iter_mut().zip(found) {
            assert!(
                found == *expected || found == value,
                "a failed change wrote other bytes"
            );
            *expected = found;
        }
    }

    fn read(&self, start: usize, end: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; end - start];
        self.image.read(&mut &mut bytes[..], start as u64).unwrap();
        bytes
    }

    fn compare(&self, start: usize, end: usize) {
        let (found, expected) = (self.read(start, end), &self.expected[start..end]);
        if found != expected {
            let position = (0..found.len()).find(|position| found[*position] != expected[*position]);
            let position = position.unwrap();
            panic!(
                "byte {} is {:#x}, expected {:#x}",
                start + position,
                found[position],
                expected[position]
            );
        }
    }

    /// Opens the disk again, in a process of the same boot of the host or of another one.
    fn restart(&mut self, boot: [u8; 16]) {
        self.cow.fail_after(None);
        self.image = open(&self.base, &self.cow, boot);
        self.has_failed = false;
        if boot == self.boot {
            return;
        }
        self.boot = boot;
        let base = self.base.content();
        for (cluster, is_durable) in self.durable.iter().enumerate() {
            let start = cluster * CLUSTER;
            let end = (start + CLUSTER).min(self.expected.len());
            let found = self.read(start, end);
            // A cluster may have its new content although the model does not count it as durable: a flush that failed,
            // or a change that failed after it had completed the cluster, may have made it durable.
            let is_expected = found == self.expected[start..end];
            let is_base = found == base[start..end];
            assert!(is_expected || (is_base && !is_durable), "cluster {cluster} is lost");
            self.expected[start..end].copy_from_slice(&found);
            self.present[cluster] = *is_durable;
        }
    }
}

fn open(base: &MemoryFile, cow: &MemoryFile, boot: [u8; 16]) -> Image {
    Image::open(Box::new(base.clone()), Box::new(cow.clone()), boot).unwrap()
}
