//! What an image contains as a whole: where the file should end, and how much is allocated.

use std::io;

use super::{
    error::{Qcow2Error, read_error},
    header::Header,
    tables::{Mapping, Tables},
};
use crate::io::{ReadAt, read_or_end};

/// The number of refcount blocks without a used cluster after which the search for the last used cluster ends.
const MAX_EMPTY_BLOCKS: usize = 4;

/// The maximum size of a refcount table in bytes, which is that of QEMU.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// The size of the pieces in which the refcount table is read, in bytes.
const PIECE_SIZE: u64 = 64 << 10;

/// The clusters of a disk by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Survey {
    /// Clusters whose bytes are in the file.
    pub data_clusters: u64,
    /// Clusters whose compressed bytes are in the file.
    pub compressed_clusters: u64,
    /// Clusters that read as zeroes.
    pub zero_clusters: u64,
}

/// Reads all tables.
pub(super) fn survey(file: &dyn ReadAt, header: &Header, tables: &Tables) -> io::Result<Survey> {
    let clusters = header.size.div_ceil(1 << header.cluster_bits);
    let mut survey = Survey::default();
    for number in 0..tables.pieces() {
        let first = number * tables.piece_entries();
        let last = clusters.min(first + tables.piece_entries());
        let Some(piece) = tables.read_piece(file, number)? else {
            survey.zero_clusters += last - first;
            continue;
        };
        for (cluster, entry) in (first..last).zip(piece.iter()) {
            match tables.place(cluster, *entry).map_err(io::Error::other)? {
                Mapping::Zero => survey.zero_clusters += 1,
                Mapping::Data(_) => survey.data_clusters += 1,
                Mapping::Compressed(_) => survey.compressed_clusters += 1,
            }
        }
    }
    Ok(survey)
}

/// Checks that the file does not end before its last used cluster starts. A download that was cut off is found before a
/// guest reads the missing part, with a few reads: the refcounts tell which cluster is the last one.
pub(super) fn check_end(file: &dyn ReadAt, header: &Header, file_size: u64) -> Result<(), Qcow2Error> {
    let failed = read_error("the refcounts");
    let truncated = |part, position| Qcow2Error::Truncated {
        part,
        position,
        size: file_size,
    };
    let cluster_size = 1_u64 << header.cluster_bits;
    let (table, table_size) = (
        header.refcount_table_offset,
        u64::from(header.refcount_table_clusters) * cluster_size,
    );
    if !table.is_multiple_of(cluster_size) || table == 0 {
        return Err(Qcow2Error::Field {
            field: "refcount_table_offset",
            value: table,
            problem: "not the start of a cluster after the header",
        });
    }
    if table_size == 0 || table_size > MAX_REFCOUNT_TABLE {
        return Err(Qcow2Error::Field {
            field: "refcount_table_clusters",
            value: header.refcount_table_clusters.into(),
            problem: "and the table must have 1 byte to 8 MiB",
        });
    }
    if table.checked_add(table_size).is_none_or(|end| end > file_size) {
        return Err(truncated("the refcount table", table));
    }
    let refcount_bits = 1_u64 << header.refcount_order;
    let refcounts_per_block = cluster_size * 8 / refcount_bits;
    let mut empty_blocks = 0;
    let mut end = table_size;
    while end > 0 {
        let start = end.saturating_sub(PIECE_SIZE);
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        read_or_end(file, &mut bytes, table + start)
            .map_err(&failed)?
            .ok_or_else(|| truncated("the refcount table", table))?;
        let (entries, _) = bytes.as_chunks::<8>();
        for (number, entry) in entries.iter().enumerate().rev() {
            let block = u64::from_be_bytes(*entry) & !0x1ff;
            if block == 0 {
                continue;
            }
            let mut refcounts = vec![0; usize::try_from(cluster_size).unwrap_or(0)];
            read_or_end(file, &mut refcounts, block)
                .map_err(&failed)?
                .ok_or_else(|| truncated("a refcount block", block))?;
            let Some(last) = refcounts.iter().rposition(|byte| *byte != 0) else {
                empty_blocks += 1;
                if empty_blocks == MAX_EMPTY_BLOCKS {
                    return Ok(());
                }
                continue;
            };
            // A byte with several refcounts has at least one that is not zero: take the first one.
            let last = (start / 8 + number as u64)
                .checked_mul(refcounts_per_block)
                .and_then(|first| first.checked_add(last as u64 * 8 / refcount_bits))
                .and_then(|cluster| cluster.checked_mul(cluster_size));
            return match last {
                Some(position) if position < file_size => Ok(()),
                position => Err(truncated("the last cluster", position.unwrap_or(u64::MAX))),
            };
        }
        end = start;
    }
    Ok(())
}
