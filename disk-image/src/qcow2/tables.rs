//! The two levels of tables that map clusters of the guest to places in the file.

use std::{io, sync::Arc};

use parking_lot::Mutex;

use super::{
    compressed::CompressedCluster,
    error::{Qcow2Error, read_error},
    header::Header,
};
use crate::{
    io::{ReadAt, read_exact_or_none},
    limits::check_range,
};

/// The maximum number of entries in a cached piece of an L2 table: 4 KiB.
const MAX_PIECE_ENTRIES: u64 = 512;

/// The number of cached pieces. They take 1 MiB, and with clusters of 64 KiB they map 8 GiB.
const CACHED_PIECES: usize = 256;

/// The number of L1 entries that are read at once.
const L1_PIECE_ENTRIES: u64 = 8192;

/// Bits 9 to 55 of an entry: a position in the file.
const POSITION: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Where a part of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Not in the file: it reads as zeroes.
    Zero,
    /// In the file, from this position on.
    Data(u64),
    /// In this cluster.
    Compressed(CompressedCluster),
}

/// The entries of a part of an L2 table.
pub(super) type Piece = Arc<[u64]>;

/// A slot of the cache: the number of a piece, counted over all L2 tables, and its entries.
type Slot = Mutex<Option<(u64, Piece)>>;

#[derive(Debug)]
pub(super) struct Tables {
    version: u32,
    cluster_bits: u32,
    disk_size: u64,
    file_size: u64,
    l1_offset: u64,
    l1_entries: u64,
    /// A piece is only in the slot of its number modulo the number of slots.
    cache: Vec<Slot>,
}

impl Tables {
    pub(super) fn new(header: &Header, file_size: u64) -> Self {
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
            disk_size: header.size,
            file_size,
            l1_offset: header.l1_offset,
            l1_entries: header.l1_entries,
            cache: (0..CACHED_PIECES).map(|_| Slot::default()).collect(),
        }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8
    }

    /// The same for all pieces: an L2 table, or a part of one that is large.
    pub(super) fn piece_entries(&self) -> u64 {
        self.l2_entries().min(MAX_PIECE_ENTRIES)
    }

    /// The number of pieces that the disk uses.
    pub(super) fn pieces(&self) -> u64 {
        self.disk_size.div_ceil(self.cluster_size() * self.piece_entries())
    }

    /// Checks all entries of the L1 table.
    pub(super) fn check_l1(&self, file: &dyn ReadAt) -> Result<(), Qcow2Error> {
        let mut first = 0;
        while first < self.l1_entries {
            let count = (self.l1_entries - first).min(L1_PIECE_ENTRIES);
            let piece = self.read_entries(file, "the L1 table", self.l1_offset + first * 8, count)?;
            for (index, entry) in (first..).zip(piece.iter()) {
                self.l2_position(index, *entry)?;
            }
            first += count;
        }
        Ok(())
    }

    /// The position of the L2 table that the L1 entry `entry` names. `None` if there is none.
    fn l2_position(&self, index: u64, entry: u64) -> Result<Option<u64>, Qcow2Error> {
        let position = entry & POSITION;
        if position == 0 {
            return Ok(None);
        }
        if !position.is_multiple_of(self.cluster_size()) {
            return Err(Qcow2Error::Entry {
                table: "L1",
                index,
                value: entry,
                problem: "not the start of a cluster",
            });
        }
        match position.checked_add(self.cluster_size()) {
            Some(end) if end <= self.file_size => Ok(Some(position)),
            _ => Err(self.truncated("an L2 table", position)),
        }
    }

    fn truncated(&self, part: &'static str, position: u64) -> Qcow2Error {
        Qcow2Error::Truncated {
            part,
            position,
            size: self.file_size,
        }
    }

    fn read_entries(
        &self,
        file: &dyn ReadAt,
        part: &'static str,
        position: u64,
        count: u64,
    ) -> Result<Piece, Qcow2Error> {
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(0)];
        read_exact_or_none(file, &mut bytes, position)
            .map_err(read_error(part))?
            .ok_or_else(|| self.truncated(part, position))?;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    /// The piece number `number`. `None` if all of its clusters are unallocated because there is no L2 table.
    pub(super) fn read_piece(&self, file: &dyn ReadAt, number: u64) -> Result<Option<Piece>, Qcow2Error> {
        let entry_index = number * self.piece_entries();
        let l1_index = entry_index / self.l2_entries();
        let l1 = self.read_entries(file, "the L1 table", self.l1_offset + l1_index * 8, 1)?;
        let entry = l1.first().copied().unwrap_or(0);
        let Some(table) = self.l2_position(l1_index, entry)? else {
            return Ok(None);
        };
        let position = table + entry_index % self.l2_entries() * 8;
        self.read_entries(file, "an L2 table", position, self.piece_entries())
            .map(Some)
    }

    fn piece(&self, file: &dyn ReadAt, number: u64) -> Result<Piece, Qcow2Error> {
        let slot = usize::try_from(number % CACHED_PIECES as u64).unwrap_or(0);
        if let Some((cached, piece)) = &*self.cache[slot].lock()
            && *cached == number
        {
            return Ok(piece.clone());
        }
        // An empty piece stands for one without allocated clusters.
        let piece = self.read_piece(file, number)?.unwrap_or_default();
        *self.cache[slot].lock() = Some((number, piece.clone()));
        Ok(piece)
    }

    /// Where guest cluster `cluster` with the L2 entry `entry` is.
    pub(super) fn place(&self, cluster: u64, entry: u64) -> Result<Mapping, Qcow2Error> {
        let invalid = |problem| Qcow2Error::Entry {
            table: "L2",
            index: cluster,
            value: entry,
            problem,
        };
        if entry & COMPRESSED != 0 {
            // The position has 62 - (cluster_bits - 8) bits; the rest up to bit 61 is the number of sectors after the
            // one in which the data starts.
            let position_bits = 70 - self.cluster_bits;
            let position = entry & ((1 << position_bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> position_bits) + 1;
            if position >= self.file_size {
                return Err(self.truncated("a compressed cluster", position));
            }
            return Ok(Mapping::Compressed(CompressedCluster {
                number: cluster,
                position,
                length: sectors * 512 - position % 512,
            }));
        }
        if entry & ZERO != 0 {
            return match self.version {
                2 => Err(invalid("a zero cluster, which version 2 does not have")),
                _ => Ok(Mapping::Zero),
            };
        }
        let position = entry & POSITION;
        if position == 0 {
            return Ok(Mapping::Zero);
        }
        if !position.is_multiple_of(self.cluster_size()) {
            return Err(invalid("not the start of a cluster"));
        }
        // The file may end within its last cluster, after the bytes that belong to the disk.
        let used = (self.disk_size - cluster * self.cluster_size()).min(self.cluster_size());
        match position.checked_add(used) {
            Some(end) if end <= self.file_size => Ok(Mapping::Data(position)),
            _ => Err(self.truncated("a cluster", position)),
        }
    }

    /// See [`super::Qcow2::map`].
    pub(super) fn map(&self, file: &dyn ReadAt, offset: u64, length: u64) -> io::Result<(Mapping, u64)> {
        check_range(self.disk_size, offset, length.min(1))?;
        let end = self.disk_size.min(offset.saturating_add(length));
        let cluster_size = self.cluster_size();
        let first = offset / cluster_size;
        let number = first / self.piece_entries();
        let piece = self.piece(file, number).map_err(io::Error::other)?;
        let piece_end = (number + 1) * self.piece_entries() * cluster_size;
        let end = end.min(piece_end);
        if piece.is_empty() {
            return Ok((Mapping::Zero, end - offset));
        }
        let place = |cluster: u64| {
            let index = usize::try_from(cluster % self.piece_entries()).unwrap_or(usize::MAX);
            let entry = piece.get(index).copied().unwrap_or(0);
            self.place(cluster, entry).map_err(io::Error::other)
        };
        let start = place(first)?;
        let mut next = first + 1;
        while next * cluster_size < end {
            let continues = match (start, place(next)) {
                (Mapping::Zero, Ok(Mapping::Zero)) => true,
                (Mapping::Data(start), Ok(Mapping::Data(position))) => {
                    position == start + (next - first) * cluster_size
                }
                _ => false,
            };
            if !continues {
                break;
            }
            next += 1;
        }
        let length = end.min(next * cluster_size) - offset;
        match start {
            Mapping::Data(position) => Ok((Mapping::Data(position + offset % cluster_size), length)),
            other => Ok((other, length)),
        }
    }
}
