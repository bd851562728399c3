//! Guest physical address space: which addresses are memory, and which belong to devices.

use std::ops::Range;

/// The addresses that are reserved for devices: the last GiB below 4 GiB.
pub(crate) const DEVICE_WINDOW: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// The size of a huge page in bytes. The size of guest memory is a multiple of it.
pub(crate) const HUGE_PAGE_SIZE: u64 = 2 << 20;

pub(super) const PAGE_SIZE: u64 = 4096;

/// The address and length of each range that `bytes` of boot memory occupy: first below [`DEVICE_WINDOW`], the
/// remainder from 4 GiB on.
pub(crate) fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(DEVICE_WINDOW.start);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((DEVICE_WINDOW.end, bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use arbtest::arbtest;

    use super::*;

    #[test]
    fn memory_of_any_size_is_complete_and_outside_of_the_device_window() {
        arbtest(|input| {
            let bytes = input.int_in_range(1..=(1 << 46) / HUGE_PAGE_SIZE)? * HUGE_PAGE_SIZE;

            let ranges = ram_ranges(bytes);

            assert_eq!(ranges.iter().map(|(_, length)| length).sum::<u64>(), bytes);
            let mut end = 0;
            for (start, length) in ranges {
                assert!(start >= end && length > 0, "{start:#x}");
                end = start + length;
                assert!(end <= DEVICE_WINDOW.start || start >= DEVICE_WINDOW.end, "{start:#x}");
            }
            Ok(())
        })
        .size_max(512)
        .budget_ms(500);
    }

    #[test]
    fn memory_leaves_the_device_window_free() {
        let gib = 1 << 30;
        let cases = [
            (256 << 20, vec![(0, 256 << 20)]),
            (3 * gib, vec![(0, 3 * gib)]),
            (5 * gib, vec![(0, 3 * gib), (4 * gib, 2 * gib)]),
        ];
        for (bytes, expected) in cases {
            assert_eq!(ram_ranges(bytes), expected, "{bytes}");
        }
    }
}
