//! Types of partitions, from the partition table of a disk. The kernel finds the partitions; it does not report their
//! types.

use std::collections::BTreeMap;

use crate::superblock::{bytes_at, u32_at, u64_at};

/// The types of partitions that matter to boot loaders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PartitionType {
    /// A FAT file system with boot loaders (UEFI specification).
    EfiSystem,
    /// The extended boot loader partition (Discoverable Partitions Specification).
    ExtendedBootLoader,
    /// Any other type.
    #[default]
    Other,
}

/// The largest number of partitions in a table. A GPT has room for 128.
const MAX_PARTITIONS: u32 = 128;

/// c12a7328-f81f-11d2-ba4b-00a0c93ec93b, with the byte order of a GPT.
const EFI_SYSTEM_GUID: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];

/// bc13c2ff-59e6-4262-a352-b275fd6f7172, with the byte order of a GPT.
const EXTENDED_BOOT_LOADER_GUID: [u8; 16] = [
    0xff, 0xc2, 0x13, 0xbc, 0xe6, 0x59, 0x62, 0x42, 0xa3, 0x52, 0xb2, 0x75, 0xfd, 0x6f, 0x71, 0x72,
];

/// Returns the types of the partitions that are not [`PartitionType::Other`], by their number, from the first
/// [`crate::START_SIZE`] bytes of a disk. `block_size` is the size of the disk's logical blocks in bytes.
///
/// Supports the primary partitions of an MBR, and the entries of a GPT that lie in `start`. Tools write them directly
/// after the header.
#[must_use]
pub fn partition_types(start: &[u8], block_size: usize) -> BTreeMap<u32, PartitionType> {
    gpt_types(start, block_size).unwrap_or_else(|| mbr_types(start))
}

/// Reads a GPT (UEFI Specification 2.10, section 5.3). Returns `None` if there is none.
fn gpt_types(start: &[u8], block_size: usize) -> Option<BTreeMap<u32, PartitionType>> {
    let header = start.get(block_size..)?;
    if !header.starts_with(b"EFI PART") {
        return None;
    }
    let first_block = usize::try_from(u64_at(header, 72)?).ok()?;
    let table = start.get(first_block.checked_mul(block_size)?..)?;
    let count = u32_at(header, 80)?.min(MAX_PARTITIONS);
    let size = usize::try_from(u32_at(header, 84)?).ok()?;
    let type_of = |number: u32| {
        let at = usize::try_from(number - 1).ok()?.checked_mul(size)?;
        let partition_type = match bytes_at::<16>(table, at)? {
            EFI_SYSTEM_GUID => PartitionType::EfiSystem,
            EXTENDED_BOOT_LOADER_GUID => PartitionType::ExtendedBootLoader,
            _ => return None,
        };
        Some((number, partition_type))
    };
    Some((1..=count).filter_map(type_of).collect())
}

/// Reads the primary partitions of an MBR.
fn mbr_types(start: &[u8]) -> BTreeMap<u32, PartitionType> {
    if bytes_at(start, 510) != Some([0x55, 0xaa]) {
        return BTreeMap::new();
    }
    let types = [(1, 0x1be), (2, 0x1ce), (3, 0x1de), (4, 0x1ee)];
    let type_of = |(number, at): (u32, usize)| {
        let partition_type = match start.get(at + 4)? {
            0xef => PartitionType::EfiSystem,
            0xea => PartitionType::ExtendedBootLoader,
            _ => return None,
        };
        Some((number, partition_type))
    };
    types.into_iter().filter_map(type_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt(block_size: usize, first_block: u64, entry_size: u32) -> Vec<u8> {
        let mut start = vec![0; 64 << 10];
        start[block_size..block_size + 8].copy_from_slice(b"EFI PART");
        start[block_size + 72..block_size + 80].copy_from_slice(&first_block.to_le_bytes());
        start[block_size + 80..block_size + 84].copy_from_slice(&128_u32.to_le_bytes());
        start[block_size + 84..block_size + 88].copy_from_slice(&entry_size.to_le_bytes());
        start
    }

    #[test]
    fn types_of_a_gpt_are_found() {
        for block_size in [512, 4096] {
            let mut start = gpt(block_size, 2, 128);
            for (number, guid) in [(15, EFI_SYSTEM_GUID), (16, EXTENDED_BOOT_LOADER_GUID)] {
                let at = 2 * block_size + (number - 1) * 128;
                start[at..at + 16].copy_from_slice(&guid);
            }
            let expected = [(15, PartitionType::EfiSystem), (16, PartitionType::ExtendedBootLoader)];
            assert_eq!(partition_types(&start, block_size), expected.into());
        }
    }

    #[test]
    fn types_of_an_mbr_are_found() {
        let mut start = vec![0; 512];
        (start[510], start[511]) = (0x55, 0xaa);
        (start[0x1be + 4], start[0x1ce + 4]) = (0x83, 0xef);
        assert_eq!(partition_types(&start, 512), [(2, PartitionType::EfiSystem)].into());
        start[510] = 0;
        assert!(partition_types(&start, 512).is_empty());
    }

    #[test]
    fn gpt_with_absurd_numbers_has_no_types() {
        for (first_block, entry_size) in [(u64::MAX, 128), (1 << 40, 128), (2, u32::MAX), (2, 0)] {
            let start = gpt(512, first_block, entry_size);
            assert!(partition_types(&start, 512).is_empty());
        }
        assert!(partition_types(&[], 512).is_empty());
        assert!(partition_types(b"EFI PART", 0).is_empty());
    }
}
