//! Reads the tables of an image as a whole.

use super::{
    error::Qcow2Error,
    header::Header,
    tables::{Mapping, Tables},
};
use crate::io::ReadAt;

/// The maximum number of entries of L2 tables that are checked when an image is opened, 8 MiB. With clusters of 64 KiB
/// that is the disk up to 64 GiB.
const MAX_CHECKED_ENTRIES: u64 = 1 << 20;

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

/// Checks the L2 tables, so that an image whose file was cut off is refused before a guest reads the missing part. The
/// check is limited, because the tables of a hostile image can take seconds to read; the guest gets an I/O error for an
/// invalid entry after that.
pub(super) fn check_tables(file: &dyn ReadAt, header: &Header, tables: &Tables) -> Result<(), Qcow2Error> {
    let pieces = MAX_CHECKED_ENTRIES / tables.piece_entries();
    survey_pieces(file, header, tables, pieces.min(tables.pieces())).map(drop)
}

/// Reads all tables.
pub(super) fn survey(file: &dyn ReadAt, header: &Header, tables: &Tables) -> Result<Survey, Qcow2Error> {
    survey_pieces(file, header, tables, tables.pieces())
}

/// Reads the first `pieces` of the L2 tables.
fn survey_pieces(file: &dyn ReadAt, header: &Header, tables: &Tables, pieces: u64) -> Result<Survey, Qcow2Error> {
    let clusters = header.size.div_ceil(1 << header.cluster_bits);
    let mut survey = Survey::default();
    for number in 0..pieces {
        let first = number * tables.piece_entries();
        let last = clusters.min(first + tables.piece_entries());
        let Some(piece) = tables.read_piece(file, number)? else {
            survey.zero_clusters += last - first;
            continue;
        };
        for (cluster, entry) in (first..last).zip(piece.iter()) {
            match tables.place(cluster, *entry)? {
                Mapping::Zero => survey.zero_clusters += 1,
                Mapping::Data(_) => survey.data_clusters += 1,
                Mapping::Compressed(_) => survey.compressed_clusters += 1,
            }
        }
    }
    Ok(survey)
}
