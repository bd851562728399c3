//! The layout of a copy-on-write file, and the header that binds it to its base image.

use super::error::CowError;
use crate::base::Base;

/// The size of a cluster in bytes.
pub(super) const CLUSTER_SIZE: u64 = 64 << 10;

/// The size of the header block, and of the blocks in which bitmaps are read and written, in bytes.
pub(super) const BLOCK_SIZE: u64 = 4 << 10;

const MAGIC: [u8; 8] = *b"NUTSHCOW";
const VERSION: u32 = 1;

/// The number of bytes of the header block that are used.
const HEADER_SIZE: usize = 56;

/// Positions in the file in bytes. Guest clusters come first, each at its position on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_size: u64,
    /// The header block.
    pub(super) header: u64,
    /// The bitmap of clusters that are complete, also after a crash of the host.
    pub(super) durable: u64,
    /// The bitmap of clusters that are complete, unless the host has crashed.
    pub(super) current: u64,
    pub(super) file_size: u64,
}

impl Layout {
    pub(super) fn new(disk_size: u64) -> Self {
        let header = disk_size.next_multiple_of(CLUSTER_SIZE);
        let durable = header + BLOCK_SIZE;
        let bitmap = (header / CLUSTER_SIZE).div_ceil(8).next_multiple_of(BLOCK_SIZE);
        Self {
            disk_size,
            header,
            durable,
            current: durable + bitmap,
            file_size: durable + 2 * bitmap,
        }
    }

    /// The size of a bitmap in bytes.
    pub(super) fn bitmap_size(&self) -> u64 {
        self.current - self.durable
    }

    /// The end of `cluster` on the disk.
    pub(super) fn end_of(&self, cluster: u64) -> u64 {
        ((cluster + 1) * CLUSTER_SIZE).min(self.disk_size)
    }
}

/// The content of the header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    disk_size: u64,
    /// Of the first cluster of the base image.
    base_checksum: u64,
    /// The boot ID of the host when the bitmap `current` was last written.
    pub(super) host_boot: [u8; 16],
}

impl Header {
    pub(super) fn new(base: &Base, host_boot: [u8; 16]) -> Result<Self, CowError> {
        Ok(Self {
            disk_size: base.size(),
            base_checksum: base.checksum_of_start(CLUSTER_SIZE).map_err(CowError::Base)?,
            host_boot,
        })
    }

    pub(super) fn to_block(self) -> Vec<u8> {
        let mut block = Vec::with_capacity(usize::try_from(BLOCK_SIZE).unwrap_or(0));
        block.extend(MAGIC);
        block.extend(VERSION.to_le_bytes());
        block.extend(u32::try_from(CLUSTER_SIZE).unwrap_or(0).to_le_bytes());
        block.extend(self.disk_size.to_le_bytes());
        block.extend(self.base_checksum.to_le_bytes());
        block.extend([0; 8]);
        block.extend(self.host_boot);
        debug_assert_eq!(block.len(), HEADER_SIZE);
        block.resize(usize::try_from(BLOCK_SIZE).unwrap_or(0), 0);
        block
    }

    /// Checks that `block` is the header of a copy-on-write file for the base image of `self`. Returns the host's
    /// boot ID in it.
    pub(super) fn check(&self, block: &[u8]) -> Result<[u8; 16], CowError> {
        let u32_at = |offset: usize| u32::from_le_bytes(field(block, offset));
        let u64_at = |offset: usize| u64::from_le_bytes(field(block, offset));
        if field::<8>(block, 0) != MAGIC {
            return Err(CowError::Magic(field(block, 0)));
        }
        let fields = [
            ("version", u32_at(8).into(), VERSION.into()),
            ("cluster size", u32_at(12).into(), CLUSTER_SIZE),
            ("disk size", u64_at(16), self.disk_size),
            ("checksum of the base image's start", u64_at(24), self.base_checksum),
        ];
        for (field, value, expected) in fields {
            if value != expected {
                return Err(CowError::Field { field, value, expected });
            }
        }
        Ok(field(block, 40))
    }
}

fn field<const SIZE: usize>(block: &[u8], offset: usize) -> [u8; SIZE] {
    block
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; SIZE])
}
