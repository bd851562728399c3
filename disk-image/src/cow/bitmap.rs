//! The bitmap of present clusters in memory. Bits are set and never cleared.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::header::BLOCK_SIZE;

#[derive(Debug)]
pub(super) struct Bitmap {
    /// Cluster n is bit n % 8 of byte n / 8, as in the file.
    bytes: Vec<AtomicU8>,
    /// Which blocks of [`BLOCK_SIZE`] bytes have bits that the durable bitmap of the file may lack.
    unrecorded: Vec<AtomicBool>,
}

impl Bitmap {
    /// An empty bitmap of `size` bytes, a multiple of [`BLOCK_SIZE`].
    pub(super) fn new(size: u64) -> Self {
        let count = |size| usize::try_from(size).unwrap_or(0);
        Self {
            bytes: (0..count(size)).map(|_| AtomicU8::new(0)).collect(),
            unrecorded: (0..count(size / BLOCK_SIZE)).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Replaces block number `block` by `bytes`. `is_recorded` says whether the durable bitmap of the file has the same
    /// bits.
    pub(super) fn load_block(&mut self, block: usize, bytes: &[u8], is_recorded: bool) {
        let start = block * usize::try_from(BLOCK_SIZE).unwrap_or(0);
        for (target, byte) in self.bytes.iter_mut().skip(start).zip(bytes) {
            *target.get_mut() = *byte;
        }
        if let Some(flag) = self.unrecorded.get_mut(block) {
            *flag.get_mut() = !is_recorded;
        }
    }

    pub(super) fn block(&self, block: usize) -> Vec<u8> {
        let size = usize::try_from(BLOCK_SIZE).unwrap_or(0);
        self.bytes
            .iter()
            .skip(block * size)
            .take(size)
            .map(|byte| byte.load(Ordering::Acquire))
            .collect()
    }

    /// Whether the data of `cluster` is complete in the file.
    pub(super) fn is_present(&self, cluster: u64) -> bool {
        let byte = usize::try_from(cluster / 8)
            .ok()
            .and_then(|index| self.bytes.get(index));
        byte.is_some_and(|byte| byte.load(Ordering::Acquire) & 1 << (cluster % 8) != 0)
    }

    /// Whether cluster `first` is present, and the end of the run of clusters from `first` on that have the same state.
    /// The run ends at `end` at the latest.
    pub(super) fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let present = self.is_present(first);
        let mut next = first + 1;
        while next < end && self.is_present(next) == present {
            next += 1;
        }
        (present, next)
    }

    /// The bytes of the bitmap that contain clusters `first..end` after these are set, and the position of the first
    /// such byte. Only valid while no other thread sets bits in the same bytes.
    pub(super) fn bytes_with(&self, first: u64, end: u64) -> (u64, Vec<u8>) {
        let bytes = (first / 8..end.div_ceil(8)).map(|index| {
            let present = usize::try_from(index).ok().and_then(|index| self.bytes.get(index));
            let present = present.map_or(0, |byte| byte.load(Ordering::Acquire));
            (0..8)
                .filter(|bit| (first..end).contains(&(index * 8 + bit)))
                .fold(present, |byte, bit| byte | 1 << bit)
        });
        (first / 8, bytes.collect())
    }

    /// Marks clusters `first..end` as present. All of their data must be in the file.
    pub(super) fn set(&self, first: u64, end: u64) {
        let (position, bytes) = self.bytes_with(first, end);
        let position = usize::try_from(position).unwrap_or(usize::MAX);
        for (target, byte) in self.bytes.iter().skip(position).zip(bytes) {
            target.fetch_or(byte, Ordering::Release);
        }
        for cluster in [first, end - 1] {
            let block = usize::try_from(cluster / 8 / BLOCK_SIZE).ok();
            if let Some(flag) = block.and_then(|block| self.unrecorded.get(block)) {
                flag.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Returns the blocks with bits that the durable bitmap may lack. They count as recorded from now on.
    pub(super) fn take_unrecorded(&self) -> Vec<usize> {
        let flags = self.unrecorded.iter().enumerate();
        flags
            .filter(|(_, flag)| flag.swap(false, Ordering::SeqCst))
            .map(|(block, _)| block)
            .collect()
    }

    /// Undoes [`Bitmap::take_unrecorded`] for `blocks`.
    pub(super) fn mark_unrecorded(&self, blocks: &[usize]) {
        for flag in blocks.iter().filter_map(|block| self.unrecorded.get(*block)) {
            flag.store(true, Ordering::SeqCst);
        }
    }
}
