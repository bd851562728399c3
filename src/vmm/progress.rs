//! Evidence that the guest's boot makes progress, for the shim's deadline.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::control::monotonic_now;

/// The number of slots for addresses. More than the registers that a booting guest uses, so that few collide.
const SLOTS: u64 = 4096;

/// Counts the I/O addresses that the guest has used. A guest that hangs, or that repeats a loop, uses no new ones, so
/// the count stops; it also has an upper bound, so that no guest can make progress without end.
#[derive(Debug)]
pub(super) struct BootProgress {
    used: Box<[AtomicU64]>,
    count: AtomicU64,
    first_io_at: OnceLock<Duration>,
}

impl BootProgress {
    /// No address is used yet.
    pub(super) fn new() -> Self {
        Self {
            used: (0..SLOTS / 64).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
            first_io_at: OnceLock::new(),
        }
    }

    /// Records an access of the guest to an I/O address.
    pub(super) fn record(&self, address: u64) {
        // Registers are aligned to 4 bytes. On the container board, each device has a window of 4 KiB, of which the
        // first 64 registers matter: this gives each of them its own slot. On the PC board, registers share slots.
        let slot = ((address >> 2) ^ (address >> 6)) % SLOTS;
        // Less than SLOTS, so it fits.
        let (word, bit) = (&self.used[(slot / 64) as usize], 1 << (slot % 64));
        if word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        self.record_first();
    }

    /// Records any I/O access of the guest, if it is the first one.
    pub(super) fn record_first(&self) {
        self.first_io_at.get_or_init(monotonic_now);
    }

    /// When the guest did its first I/O, on the clock of [`monotonic_now`].
    pub(super) fn first_io_at(&self) -> Option<Duration> {
        self.first_io_at.get().copied()
    }

    /// The number of different addresses so far. Two addresses may count as one.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_addresses_count_as_progress() {
        let progress = BootProgress::new();
        let registers =
            || (0..8).flat_map(|device| (0..16).map(move |register| 0xd000_0000 + device * 0x1000 + register * 4));
        for _ in 0..3 {
            registers().for_each(|address| progress.record(address));
            assert_eq!(progress.count(), 8 * 16);
        }
    }

    #[test]
    fn progress_of_a_hostile_guest_is_bounded() {
        let progress = BootProgress::new();
        (0..1_000_000).for_each(|address| progress.record(address * 4));
        assert_eq!(progress.count(), SLOTS);
    }
}
