//! Several files of the host as one disk, one after the other.

use std::{fs::File, io};

use nutshell_disk_image::{
    SECTOR_SIZE,
    io::{discard_file_range, zero_file_range},
};

use super::transfer::{read_file, write_file};
use crate::devices::virtio::buffers::Buffers;

/// Why files cannot be a disk.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JoinedFilesError {
    #[error("it has no files")]
    None,
    /// The number counts from 1.
    #[error("file {number} has {length} bytes, which is not a positive multiple of {SECTOR_SIZE}")]
    Length { number: usize, length: u64 },
    #[error("its files have more than 2^63 bytes together")]
    TooLarge,
}

/// A file of a disk. The guest sees its first `length` bytes.
#[derive(Debug)]
pub(crate) struct JoinedFile {
    pub(crate) file: File,
    /// A multiple of the sector size, and not 0.
    pub(crate) length: u64,
    pub(crate) read_only: bool,
}

/// The files of a disk, in the order of their bytes.
#[derive(Debug)]
pub(crate) struct JoinedFiles {
    /// Each with the offset of its first byte in the disk. Offsets ascend.
    files: Vec<(u64, JoinedFile)>,
    size: u64,
}

/// The part of a request that one file serves.
struct Piece<'f> {
    file: &'f JoinedFile,
    /// The position of the file, from 1.
    number: usize,
    /// The offset in the file.
    offset: u64,
    /// How many bytes the file has from there on.
    available: u64,
}

impl JoinedFiles {
    pub(crate) fn new(files: Vec<JoinedFile>) -> Result<Self, JoinedFilesError> {
        let mut size = 0_u64;
        let mut placed = Vec::with_capacity(files.len());
        for (number, file) in (1..).zip(files) {
            let (start, length) = (size, file.length);
            if length == 0 || !length.is_multiple_of(SECTOR_SIZE) {
                return Err(JoinedFilesError::Length { number, length });
            }
            let end = size.checked_add(length).filter(|size| *size <= 1 << 63);
            size = end.ok_or(JoinedFilesError::TooLarge)?;
            placed.push((start, file));
        }
        match placed.is_empty() {
            true => Err(JoinedFilesError::None),
            false => Ok(Self { files: placed, size }),
        }
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.files.iter().all(|(_, file)| file.read_only)
    }

    /// Fills `writable` with the bytes from `offset` on.
    pub(super) fn read(&self, writable: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while writable.len() > 0 {
            let piece = self.piece(offset)?;
            let count = usize::try_from(piece.available).map_or(writable.len(), |count| count.min(writable.len()));
            read_file(&piece.file.file, piece.offset, count, writable).map_err(|error| piece.failed(self, &error))?;
            offset += count as u64;
        }
        Ok(())
    }

    /// Writes `readable` at `offset`.
    pub(super) fn write(&self, readable: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while readable.len() > 0 {
            let piece = self.writable_piece(offset)?;
            let count = usize::try_from(piece.available).map_or(readable.len(), |count| count.min(readable.len()));
            write_file(&piece.file.file, piece.offset, count, readable).map_err(|error| piece.failed(self, &error))?;
            offset += count as u64;
        }
        Ok(())
    }

    /// With `discard`, frees the space of a range; no-op for files that cannot free any ([`discard_file_range`]).
    /// Otherwise makes the range read as zeroes, and frees its space only if `unmap` ([`zero_file_range`]).
    pub(super) fn zero_or_discard(
        &self,
        mut offset: u64,
        mut length: u64,
        discard: bool,
        unmap: bool,
    ) -> io::Result<()> {
        while length > 0 {
            let piece = self.writable_piece(offset)?;
            let count = piece.available.min(length);
            let zeroed = match discard {
                true => discard_file_range(&piece.file.file, piece.offset, count),
                false => zero_file_range(&piece.file.file, piece.offset, count, unmap),
            };
            zeroed.map_err(|error| piece.failed(self, &error))?;
            offset += count;
            length -= count;
        }
        Ok(())
    }

    /// Returns when all earlier writes are on stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut writable = self.files.iter().filter(|(_, file)| !file.read_only);
        writable.try_for_each(|(_, file)| file.file.sync_data())
    }

    fn piece(&self, offset: u64) -> io::Result<Piece<'_>> {
        let after = self.files.partition_point(|(start, _)| *start <= offset);
        let found = after.checked_sub(1).and_then(|index| self.files.get(index));
        let piece = found.and_then(|(start, file)| {
            let in_file = offset - start;
            let available = file.length.checked_sub(in_file).filter(|available| *available > 0)?;
            Some(Piece {
                file,
                number: after,
                offset: in_file,
                available,
            })
        });
        piece.ok_or_else(|| io::Error::other("it lies outside the files of the disk"))
    }

    fn writable_piece(&self, offset: u64) -> io::Result<Piece<'_>> {
        let piece = self.piece(offset)?;
        match piece.file.read_only {
            false => Ok(piece),
            true => Err(piece.failed(self, &io::Error::other("it is read-only"))),
        }
    }
}

impl Piece<'_> {
    /// Adds the position of the file to an error.
    fn failed(&self, disk: &JoinedFiles, error: &io::Error) -> io::Error {
        let text = format!("file {} of {}: {error}", self.number, disk.files.len());
        io::Error::new(error.kind(), text)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use virtio_bindings::virtio_blk::{
        VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    };

    use super::*;
    use crate::devices::{
        counters::Counters,
        log_capture::LogCapture,
        virtio::{
            block::{
                Block,
                disk::{Backing, Disk},
                transfer::tests::{run, segment},
            },
            device::Device,
            mock::stall_timer,
        },
    };

    /// A file of `sectors` sectors, all of whose bytes are `byte`, and one byte more, which no guest may see.
    fn file(sectors: u64, byte: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        let bytes = vec![byte; usize::try_from(sectors * SECTOR_SIZE).unwrap()];
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(b"!", sectors * SECTOR_SIZE).unwrap();
        file
    }

    /// Three files of 3, 4 and 1 sectors, of which the first and the last are read-only.
    fn joined() -> ([File; 3], JoinedFiles) {
        let files = [file(3, b'a'), file(4, b'b'), file(1, b'c')];
        let part = |index: usize, sectors: u64, read_only| JoinedFile {
            file: files[index].try_clone().unwrap(),
            length: sectors * SECTOR_SIZE,
            read_only,
        };
        let joined = JoinedFiles::new(vec![part(0, 3, true), part(1, 4, false), part(2, 1, true)]).unwrap();
        (files, joined)
    }

    fn disk(name: &str) -> ([File; 3], Disk) {
        let (files, joined) = joined();
        (files, Disk::new(Backing::Joined(joined), Counters::new(name)).unwrap())
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn read_across_files_returns_their_bytes_in_order() {
        let (_, disk) = disk("joined-read");
        assert_eq!(disk.capacity.sectors(), 8);

        let (status, data) = run(&disk, VIRTIO_BLK_T_IN, 0, &[], 8 * 512);

        assert_eq!(status, 0);
        let expected = [vec![b'a'; 3 * 512], vec![b'b'; 4 * 512], vec![b'c'; 512]].concat();
        assert!(data == expected);
        let (status, data) = run(&disk, VIRTIO_BLK_T_IN, 6, &[], 1024);
        assert_eq!((status, data), (0, [vec![b'b'; 512], vec![b'c'; 512]].concat()));
    }

    #[test]
    fn only_writable_files_change() {
        for (kind, sector, out, expected) in [
            (VIRTIO_BLK_T_OUT, 3, vec![b'w'; 1024], Some(b'w')),
            (VIRTIO_BLK_T_DISCARD, 0, segment(3, 2), Some(0)),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, segment(3, 2), Some(0)),
            (VIRTIO_BLK_T_OUT, 0, vec![b'w'; 512], None),
            (VIRTIO_BLK_T_OUT, 7, vec![b'w'; 512], None),
            (VIRTIO_BLK_T_DISCARD, 0, segment(2, 1), None),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, segment(7, 1), None),
        ] {
            let (files, disk) = disk("joined-write");

            let (status, _) = run(&disk, kind, sector, &out, 0);

            assert_eq!(status == 0, expected.is_some(), "{kind} {sector}");
            let unchanged = |file: &File, byte: u8, sectors: usize| {
                contents(file) == [vec![byte; sectors * 512], b"!".to_vec()].concat()
            };
            assert!(unchanged(&files[0], b'a', 3), "{kind} {sector}");
            assert!(unchanged(&files[2], b'c', 1), "{kind} {sector}");
            let start = expected.map_or(vec![b'b'; 1024], |byte| vec![byte; 1024]);
            assert!(
                contents(&files[1]) == [start, vec![b'b'; 1024], b"!".to_vec()].concat(),
                "{kind} {sector}"
            );
            assert_eq!(run(&disk, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, 0);
        }
    }

    #[test]
    fn write_that_reaches_a_read_only_file_is_logged_with_the_position_of_the_file() {
        let (files, disk) = disk("joined-log");
        let log = LogCapture::start("joined-log");

        let (status, _) = run(&disk, VIRTIO_BLK_T_OUT, 6, &[b'w'; 1024], 0);

        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        assert_eq!(
            log.lines(),
            ["queue 0: write at byte 3072 failed, the guest gets an I/O error: file 3 of 3: it is read-only"]
        );
        assert!(contents(&files[2]).starts_with(b"c"));
        files[0].set_len(512).unwrap();
        let (status, _) = run(&disk, VIRTIO_BLK_T_IN, 0, &[], 1024);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        let expected = "queue 0: read at byte 0 failed, the guest gets an I/O error: file 1 of 3: the file has less than \
                        1024 bytes: it was truncated after it was opened";
        assert_eq!(log.lines().last().unwrap(), expected);
    }

    #[test]
    fn disk_is_read_only_for_the_guest_if_all_of_its_files_are() {
        let block = |files| {
            let backing = Backing::Joined(JoinedFiles::new(files).unwrap());
            Block::new("joined".to_owned(), backing, 1, &stall_timer())
                .unwrap()
                .features()
        };
        let part = |read_only| JoinedFile {
            file: file(1, b'x'),
            length: 512,
            read_only,
        };
        let (read_only, flush) = (1 << VIRTIO_BLK_F_RO, 1 << VIRTIO_BLK_F_FLUSH);
        assert_eq!(block(vec![part(true), part(true)]) & (read_only | flush), read_only);
        assert_eq!(block(vec![part(true), part(false)]) & (read_only | flush), flush);
    }

    #[test]
    fn files_whose_lengths_are_no_disk_are_refused() {
        for lengths in [
            &[][..],
            &[0],
            &[512, 0],
            &[100],
            &[1 << 63, 512],
            &[u64::MAX - 511, 512],
        ] {
            let part = |length: &u64| JoinedFile {
                file: file(1, b'x'),
                length: *length,
                read_only: true,
            };
            assert!(
                JoinedFiles::new(lengths.iter().map(part).collect()).is_err(),
                "{lengths:?}"
            );
        }
    }
}
