//! The copy-on-write file of a disk: it has the clusters that the guest has written, and the base image has the rest.
//!
//! The file is sparse. Clusters of 64 KiB are at their position on the disk; after them come a header block and two
//! bitmaps of present clusters ([`header`]). A present cluster that is a hole in the file reads as zeroes.
//!
//! A cluster is present when all of its bytes are in the file, not before: the file first gets the data and the
//! bytes of the base image around it, then the bit in the current bitmap. So the file is consistent whenever its
//! process is killed, and a later process continues with it. If the host crashes, the order in which it had written the
//! file's pages is unknown. Therefore a flush syncs the data before it adds bits to the durable bitmap, which is the
//! one that counts after the host's kernel has started again.
//!
//! Any number of threads use the file at the same time. Reads, and writes to present clusters, take no lock. A write
//! that makes clusters present holds the lock of their [stripe](STRIPE_CLUSTERS).

mod bitmap;
mod error;
mod header;

use std::io;

use parking_lot::Mutex;

pub use self::error::CowError;
use self::{
    bitmap::Bitmap,
    error::host_error,
    header::{BLOCK_SIZE, CLUSTER_SIZE, Header, Layout},
};
use crate::{
    base::Base,
    io::{Source, Storage, Target, drain, fill, read_exact_at},
    limits::{DISCARD_ALIGNMENT, SECTOR_SIZE, check_range},
};

/// The number of adjacent clusters that share a lock, a multiple of 8: no two stripes share a byte of a bitmap.
const STRIPE_CLUSTERS: u64 = 16;

const _: () = assert!(CLUSTER_SIZE == DISCARD_ALIGNMENT as u64 * SECTOR_SIZE);

/// The number of locks.
const STRIPES: u64 = 64;

/// A copy-on-write file.
#[derive(Debug)]
pub(crate) struct CowFile {
    file: Box<dyn Storage>,
    layout: Layout,
    present: Bitmap,
    stripes: Vec<Mutex<()>>,
    /// Held by a flush. The text is the error of a sync that failed: Linux may have dropped the data then, so a later
    /// sync that succeeds proves nothing.
    flush: Mutex<Option<String>>,
}

impl CowFile {
    /// Opens the copy-on-write file of a disk with the base image `base`, or makes one if `file` is empty. `host_boot`
    /// is the boot ID of the host.
    pub(crate) fn open(file: Box<dyn Storage>, base: &Base, host_boot: [u8; 16]) -> Result<Self, CowError> {
        let layout = Layout::new(base.size());
        let header = Header::new(base, host_boot)?;
        let size = file.size().map_err(host_error("read its size"))?;
        if size == 0 {
            file.set_size(layout.file_size)
                .map_err(host_error("set its size to that of the disk"))?;
        } else if size != layout.file_size {
            return Err(CowError::Size {
                size,
                expected: layout.file_size,
            });
        }
        let mut block = vec![0; usize::try_from(BLOCK_SIZE).unwrap_or(0)];
        read_exact_at(&*file, &mut block, layout.header).map_err(host_error("read its header"))?;
        let mut file = Self {
            file,
            layout,
            present: Bitmap::new(layout.bitmap_size()),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            flush: Mutex::default(),
        };
        // Without a header, the file is new, or the process that created it was killed before it wrote the header.
        if block.iter().all(|byte| *byte == 0) {
            file.create(header)?;
        } else {
            let last_boot = header.check(&block)?;
            file.load(header, last_boot)?;
        }
        Ok(file)
    }

    fn create(&self, header: Header) -> Result<(), CowError> {
        let Layout {
            header: start,
            file_size,
            ..
        } = self.layout;
        // Zeroed, because after a crash of the host the file may have bits in a bitmap but no header. Allocated, so
        // that a flush can write the bitmaps when the host's file system is full.
        self.file
            .zero(start, file_size - start, true)
            .and_then(|()| self.file.allocate(start, file_size - start))
            .and_then(|()| self.file.write_all_at(&header.to_block(), start))
            .map_err(host_error("write its header"))
    }

    /// Reads the bitmaps.
    fn load(&mut self, header: Header, last_boot: [u8; 16]) -> Result<(), CowError> {
        let host_restarted = last_boot != header.host_boot;
        let blocks = self.layout.bitmap_size() / BLOCK_SIZE;
        let size = usize::try_from(BLOCK_SIZE).unwrap_or(0);
        let (mut durable, mut current) = (vec![0; size], vec![0; size]);
        for (block, position) in (0..).zip((0..blocks).map(|block| block * BLOCK_SIZE)) {
            read_exact_at(&*self.file, &mut durable, self.layout.durable + position)
                .and_then(|()| read_exact_at(&*self.file, &mut current, self.layout.current + position))
                .map_err(host_error("read its bitmaps"))?;
            if host_restarted && current != durable {
                self.file
                    .write_all_at(&durable, self.layout.current + position)
                    .map_err(host_error("reset its bitmap after a restart of the host"))?;
            }
            let valid = if host_restarted { &durable } else { &current };
            self.present.load_block(block, valid, durable == *valid);
        }
        if host_restarted {
            // Last: if this process is killed before this write, the next one resets the bitmap again.
            self.file
                .write_all_at(&header.to_block(), self.layout.header)
                .map_err(host_error("write its header"))?;
        }
        Ok(())
    }

    /// Fills the next `count` bytes of `target` with the bytes of the disk at `offset`.
    pub(crate) fn read(
        &self,
        base: &Base,
        target: &mut dyn Target,
        mut offset: u64,
        mut count: usize,
    ) -> io::Result<()> {
        let end = self.check_range(offset, count as u64)?;
        while count > 0 {
            let (present, run_end) = self.present.run(offset / CLUSTER_SIZE, end.div_ceil(CLUSTER_SIZE));
            let part = usize::try_from((run_end * CLUSTER_SIZE).min(end) - offset).unwrap_or(count);
            if present {
                fill(target, &*self.file, offset, part)?;
            } else {
                base.read(target, offset, part)?;
            }
            offset += part as u64;
            count -= part;
        }
        Ok(())
    }

    /// Writes all of `source` to the disk at `offset`.
    pub(crate) fn write(&self, base: &Base, source: &mut dyn Source, mut offset: u64) -> io::Result<()> {
        let end = self.check_range(offset, source.remaining() as u64)?;
        while offset < end {
            let first = offset / CLUSTER_SIZE;
            let (present, run_end) = self.present.run(first, end.div_ceil(CLUSTER_SIZE));
            if present {
                let part_end = (run_end * CLUSTER_SIZE).min(end);
                drain(source, &*self.file, offset, to_usize(part_end - offset)?)?;
                offset = part_end;
                continue;
            }
            let stripe_end = (first / STRIPE_CLUSTERS + 1) * STRIPE_CLUSTERS;
            let _lock = self.stripe(first).lock();
            // Another thread may have changed the run before the lock was taken.
            let (present, run_end) = self.present.run(first, run_end.min(stripe_end));
            let part_end = (run_end * CLUSTER_SIZE).min(end);
            if !present {
                self.copy_around(base, offset, part_end)?;
            }
            drain(source, &*self.file, offset, to_usize(part_end - offset)?)?;
            if !present {
                self.make_present(first, run_end)?;
            }
            offset = part_end;
        }
        Ok(())
    }

    /// Makes a range of the disk read as zeroes. With `unmap`, its blocks may be freed.
    pub(crate) fn zero(&self, base: &Base, mut offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let end = self.check_range(offset, length)?;
        while offset < end {
            let first = offset / CLUSTER_SIZE;
            let stripe_end = (first / STRIPE_CLUSTERS + 1) * STRIPE_CLUSTERS;
            let last = end.div_ceil(CLUSTER_SIZE).min(stripe_end);
            let _lock = self.stripe(first).lock();
            let (present, run_end) = self.present.run(first, last);
            let part_end = (run_end * CLUSTER_SIZE).min(end);
            let reads_as_zero = !present && base.is_unallocated(offset, part_end - offset)?;
            if !reads_as_zero {
                if !present {
                    self.copy_around(base, offset, part_end)?;
                }
                self.file.zero(offset, part_end - offset, unmap)?;
                if !present {
                    self.make_present(first, run_end)?;
                }
            }
            offset = part_end;
        }
        Ok(())
    }

    /// Returns when all earlier writes are on stable storage, and remain after a crash of the host.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut failure = self.flush.lock();
        if let Some(error) = &*failure {
            return Err(io::Error::other(format!("an earlier flush failed: {error}")));
        }
        let mut sync = || {
            self.file
                .sync_data()
                .inspect_err(|error| *failure = Some(error.to_string()))
        };
        let blocks = self.present.take_unrecorded();
        // These bits are read before the sync, so all of their data is part of it.
        let contents: Vec<_> = blocks.iter().map(|block| self.present.block(*block)).collect();
        sync()?;
        if blocks.is_empty() {
            return Ok(());
        }
        for (block, content) in blocks.iter().zip(&contents) {
            let position = self.layout.durable + *block as u64 * BLOCK_SIZE;
            self.file
                .write_all_at(content, position)
                .inspect_err(|_| self.present.mark_unrecorded(&blocks))?;
        }
        sync()
    }

    /// Copies the parts of the first and last cluster of `start..end` that lie outside of that range from the base
    /// image to the file. The stripe must be locked.
    fn copy_around(&self, base: &Base, start: u64, end: u64) -> io::Result<()> {
        self.copy_from_base(base, start / CLUSTER_SIZE * CLUSTER_SIZE, start)?;
        self.copy_from_base(base, end, self.layout.end_of((end - 1) / CLUSTER_SIZE))
    }

    /// Copies a part of a cluster that is not present. An earlier write that failed may have left other bytes there.
    fn copy_from_base(&self, base: &Base, start: u64, end: u64) -> io::Result<()> {
        let length = end - start;
        if length == 0 {
            return Ok(());
        }
        if base.is_unallocated(start, length)? {
            return self.file.zero(start, length, true);
        }
        let count = to_usize(length)?;
        let mut bytes = vec![0; count];
        base.read(&mut &mut bytes[..], start, count)?;
        if bytes.iter().all(|byte| *byte == 0) {
            self.file.zero(start, length, true)
        } else {
            self.file.write_all_at(&bytes, start)
        }
    }

    /// Records that clusters `first..end` are complete. They are in one stripe, which must be locked.
    fn make_present(&self, first: u64, end: u64) -> io::Result<()> {
        let (position, bytes) = self.present.bytes_with(first, end);
        self.file.write_all_at(&bytes, self.layout.current + position)?;
        self.present.set(first, end);
        Ok(())
    }

    fn stripe(&self, cluster: u64) -> &Mutex<()> {
        let index = cluster / STRIPE_CLUSTERS % STRIPES;
        &self.stripes[usize::try_from(index).unwrap_or(0)]
    }

    /// The end of the range, if it is inside of the disk.
    fn check_range(&self, offset: u64, length: u64) -> io::Result<u64> {
        check_range(self.layout.disk_size, offset, length)?;
        Ok(offset + length)
    }
}

fn to_usize(length: u64) -> io::Result<usize> {
    usize::try_from(length).map_err(io::Error::other)
}
