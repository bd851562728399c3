//! A reader for qcow2 images of version 2 and 3 (QEMU, docs/interop/qcow2.txt).
//!
//! It reads the active state of the disk and ignores snapshots, bitmaps and all fields that only a writer needs. It
//! refuses images that need another file, a key or a repair.
//!
//! Its memory does not depend on the image: tables are read in pieces, of which a fixed number is cached, and the
//! result of a decompression has the size of one cluster. [`header`] checks the header, [`tables`] finds the place of
//! guest clusters, [`compressed`] decompresses, [`survey`] counts what is allocated.

mod compressed;
mod error;
mod header;
mod survey;
mod tables;
#[cfg(test)]
mod tests;

use std::io;

use self::{
    compressed::{ClusterCache, CompressedCluster},
    error::read_error,
    header::Header,
    tables::Tables,
};
pub use self::{
    error::{Qcow2Error, Text},
    header::Compression,
    survey::Survey,
};
pub(crate) use self::{header::MAGIC, tables::Mapping};
use crate::io::{ReadAt, Target};

/// An open image whose header and tables have been checked. Reads the tables as they are needed.
#[derive(Debug)]
pub struct Qcow2 {
    file: Box<dyn ReadAt>,
    header: Header,
    tables: Tables,
    decompressed: ClusterCache,
}

impl Qcow2 {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// The image cannot be read, is invalid, or needs something that is not supported.
    pub fn open(file: Box<dyn ReadAt>) -> Result<Self, Qcow2Error> {
        let file_size = file.size().map_err(read_error("the size of the file"))?;
        let header = Header::read(&*file, file_size)?;
        let tables = Tables::new(&header, file_size);
        tables.check_l1(&*file)?;
        survey::check_tables(&*file, &header, &tables)?;
        Ok(Self {
            decompressed: ClusterCache::new(header.compression, header.cluster_bits),
            file,
            header,
            tables,
        })
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// The size of a cluster in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// The compression of compressed clusters, if there are any.
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// The number of internal snapshots. They are ignored.
    pub fn snapshots(&self) -> u32 {
        self.header.snapshots
    }

    /// The compatible feature bits, which a reader need not know.
    pub fn compatible_features(&self) -> u64 {
        self.header.compatible_features
    }

    /// The autoclear feature bits, which a reader need not know.
    pub fn autoclear_features(&self) -> u64 {
        self.header.autoclear_features
    }

    /// Counts what is allocated, and checks all tables. It reads all of them: 128 MiB for each TiB of the disk, with
    /// clusters of 64 KiB.
    ///
    /// # Errors
    ///
    /// A table is invalid or cannot be read.
    pub fn survey(&self) -> Result<Survey, Qcow2Error> {
        survey::survey(&*self.file, &self.header, &self.tables)
    }

    pub(crate) fn file(&self) -> &dyn ReadAt {
        &*self.file
    }

    /// Where the bytes at `offset` are, and how many of the `length` bytes from there are of the same kind and
    /// contiguous in the file. `offset` must be inside of the disk.
    pub(crate) fn map(&self, offset: u64, length: u64) -> io::Result<(Mapping, u64)> {
        self.tables.map(&*self.file, offset, length)
    }

    /// Fills the next `count` bytes of `target` from `cluster`, which contains the bytes of the disk at `offset`.
    pub(crate) fn read_compressed(
        &self,
        target: &mut dyn Target,
        cluster: CompressedCluster,
        offset: u64,
        count: usize,
    ) -> io::Result<()> {
        let start = usize::try_from(offset & (self.cluster_size() - 1)).unwrap_or(usize::MAX);
        self.decompressed.with(&*self.file, cluster, |bytes| {
            match bytes.get(start..start.saturating_add(count)) {
                Some(part) => {
                    target.put(part);
                    Ok(())
                }
                None => Err(io::ErrorKind::InvalidInput.into()),
            }
        })
    }
}
