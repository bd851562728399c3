//! The header of a qcow2 image (QEMU, docs/interop/qcow2.txt, "Header" and "Header extensions").

use super::error::{Qcow2Error, Text, read_error};
use crate::{
    io::{ReadAt, read_exact_or_none},
    limits::find_size_problem,
};

/// The first bytes of an image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The size of the header of version 2 in bytes.
const HEADER_SIZE_V2: usize = 72;
/// The minimum size of the header of version 3 in bytes.
const HEADER_SIZE_V3: u32 = 104;
/// From this size on, in bytes, a header has the field compression_type.
const HEADER_SIZE_COMPRESSION: u32 = 112;

/// The range of cluster_bits, which is that of QEMU: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// The maximum number of entries of an L1 table: QEMU limits the table to 32 MiB, and an entry has 8 bytes.
const MAX_L1_ENTRIES: u64 = 4 << 20;

/// The maximum length of the name of a backing file in bytes.
const MAX_NAME: u32 = 1023;

const FEATURE_NAME_TABLE: u32 = 0x6803_f857;
/// The size of an entry of the feature name table in bytes: type, bit number, name.
const FEATURE_NAME_SIZE: usize = 48;

/// The compression of the compressed clusters of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, without a zlib header.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// `zlib` or `zstd`, as in QEMU and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// A header whose image can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The size of the disk in bytes.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    /// The number of entries of the L1 table that the disk uses.
    pub(super) l1_entries: u64,
    pub(super) snapshots: u32,
    pub(super) compression: Compression,
    pub(super) compatible_features: u64,
    pub(super) autoclear_features: u64,
}

/// The fields at the start of an image.
struct Fields([u8; HEADER_SIZE_COMPRESSION as usize]);

impl Fields {
    fn u32(&self, offset: usize) -> u32 {
        u32::from_be_bytes(self.0[offset..].first_chunk().copied().unwrap_or_default())
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_be_bytes(self.0[offset..].first_chunk().copied().unwrap_or_default())
    }
}

impl Header {
    /// Reads and checks the header of `file`, which has `file_size` bytes.
    pub(super) fn read(file: &dyn ReadAt, file_size: u64) -> Result<Self, Qcow2Error> {
        let failed = read_error("the header");
        let truncated = |part, position| Qcow2Error::Truncated {
            part,
            position,
            size: file_size,
        };
        let mut fields = Fields([0; HEADER_SIZE_COMPRESSION as usize]);
        read_exact_or_none(file, &mut fields.0[..HEADER_SIZE_V2], 0)
            .map_err(&failed)?
            .ok_or_else(|| truncated("the header", 0))?;
        let version = fields.u32(4);
        if !matches!(version, 2 | 3) {
            return Err(field("version", version, "and only 2 and 3 are supported"));
        }
        let cluster_bits = fields.u32(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(field("cluster_bits", cluster_bits, "and must be 9 to 21"));
        }
        let cluster_size = 1_u64 << cluster_bits;
        let mut header_length = u32::try_from(HEADER_SIZE_V2).unwrap_or(0);
        if version >= 3 {
            read_exact_or_none(
                file,
                &mut fields.0[HEADER_SIZE_V2..HEADER_SIZE_V3 as usize],
                HEADER_SIZE_V2 as u64,
            )
            .map_err(&failed)?
            .ok_or_else(|| truncated("the header", 0))?;
            header_length = fields.u32(100);
            if header_length < HEADER_SIZE_V3
                || !header_length.is_multiple_of(8)
                || u64::from(header_length) > cluster_size
            {
                let problem = "and must be a multiple of 8, at least 104, and at most the size of a cluster";
                return Err(field("header_length", header_length, problem));
            }
            if header_length >= HEADER_SIZE_COMPRESSION {
                let rest = &mut fields.0[HEADER_SIZE_V3 as usize..];
                read_exact_or_none(file, rest, u64::from(HEADER_SIZE_V3))
                    .map_err(&failed)?
                    .ok_or_else(|| truncated("the header", 0))?;
            }
        }
        check_features(file, &fields, version, header_length, cluster_size)?;
        let compression = match (
            fields.u64(72) & INCOMPATIBLE_COMPRESSION != 0 && version >= 3,
            fields.0[104],
        ) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (_, other) => {
                let problem = "which contradicts incompatible feature bit 3, or is unknown";
                return Err(field("compression_type", other, problem));
            }
        };
        check_self_contained(file, &fields)?;

        let size = fields.u64(24);
        if let Some(problem) = find_size_problem(size) {
            return Err(field("size", size, problem));
        }
        let bytes_per_l1_entry = cluster_size * (cluster_size / 8);
        let l1_entries = size.div_ceil(bytes_per_l1_entry);
        if l1_entries > MAX_L1_ENTRIES {
            let problem = "more than the maximum for this size of clusters";
            return Err(field("size", size, problem));
        }
        let l1_size = fields.u32(36);
        if u64::from(l1_size) < l1_entries {
            let problem = "less than the disk needs";
            return Err(field("l1_size", l1_size, problem));
        }
        let l1_offset = fields.u64(40);
        if l1_offset == 0 || !l1_offset.is_multiple_of(cluster_size) {
            return Err(field(
                "l1_table_offset",
                l1_offset,
                "not the start of a cluster after the header",
            ));
        }
        if l1_offset.checked_add(l1_entries * 8).is_none_or(|end| end > file_size) {
            return Err(truncated("the L1 table", l1_offset));
        }
        Ok(Self {
            version,
            cluster_bits,
            size,
            l1_offset,
            l1_entries,
            snapshots: fields.u32(60),
            compression,
            compatible_features: if version >= 3 { fields.u64(80) } else { 0 },
            autoclear_features: if version >= 3 { fields.u64(88) } else { 0 },
        })
    }
}

fn field(field: &'static str, value: impl Into<u64>, problem: &'static str) -> Qcow2Error {
    Qcow2Error::Field {
        field,
        value: value.into(),
        problem,
    }
}

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

fn check_features(
    file: &dyn ReadAt,
    fields: &Fields,
    version: u32,
    header_length: u32,
    cluster_size: u64,
) -> Result<(), Qcow2Error> {
    let features = if version >= 3 { fields.u64(72) } else { 0 };
    let refused = [
        (INCOMPATIBLE_DATA_FILE, Qcow2Error::DataFile),
        (INCOMPATIBLE_EXTENDED_L2, Qcow2Error::ExtendedL2),
        (INCOMPATIBLE_CORRUPT, Qcow2Error::Corrupt),
        (INCOMPATIBLE_DIRTY, Qcow2Error::Dirty),
    ];
    let mut unknown = features & !INCOMPATIBLE_COMPRESSION;
    for (bit, _) in &refused {
        unknown &= !bit;
    }
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = feature_name(file, bit, header_length, cluster_size)?;
        return Err(Qcow2Error::UnknownFeature { bit, name });
    }
    match refused.into_iter().find(|(bit, _)| features & bit != 0) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Refuses an image with a backing file or with encryption.
fn check_self_contained(file: &dyn ReadAt, fields: &Fields) -> Result<(), Qcow2Error> {
    let backing_offset = fields.u64(8);
    if backing_offset != 0 {
        let mut name = vec![0; fields.u32(16).min(MAX_NAME) as usize];
        let read = read_exact_or_none(file, &mut name, backing_offset);
        // The name is only for the error text.
        if !matches!(read, Ok(Some(()))) {
            name.clear();
        }
        return Err(Qcow2Error::BackingFile(Text::new(&name)));
    }
    match fields.u32(32) {
        0 => Ok(()),
        method => {
            let name = match method {
                1 => "AES",
                2 => "LUKS",
                _ => "unknown",
            };
            Err(Qcow2Error::Encrypted { method, name })
        }
    }
}

/// The name of an incompatible feature in the image's feature name table.
fn feature_name(
    file: &dyn ReadAt,
    bit: u32,
    header_length: u32,
    cluster_size: u64,
) -> Result<Option<Text>, Qcow2Error> {
    let failed = read_error("the header extensions");
    let mut position = u64::from(header_length);
    // The extensions are in the first cluster, and each has at least 8 bytes, so the loop ends.
    while position.saturating_add(8) <= cluster_size {
        let mut extension = [0; 8];
        if read_exact_or_none(file, &mut extension, position)
            .map_err(&failed)?
            .is_none()
        {
            return Ok(None);
        }
        let [k0, k1, k2, k3, l0, l1, l2, l3] = extension;
        let (kind, length) = (
            u32::from_be_bytes([k0, k1, k2, k3]),
            u32::from_be_bytes([l0, l1, l2, l3]),
        );
        position += 8;
        let end = position + u64::from(length);
        match kind {
            0 => return Ok(None),
            _ if end > cluster_size => return Ok(None),
            FEATURE_NAME_TABLE => {
                let mut table = vec![0; length as usize];
                if read_exact_or_none(file, &mut table, position)
                    .map_err(&failed)?
                    .is_none()
                {
                    return Ok(None);
                }
                let entry = table
                    .chunks_exact(FEATURE_NAME_SIZE)
                    .find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit);
                return Ok(entry.map(|entry| {
                    let name = &entry[2..];
                    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
                    Text::new(&name[..length])
                }));
            }
            _ => position = end.next_multiple_of(8),
        }
    }
    Ok(None)
}
