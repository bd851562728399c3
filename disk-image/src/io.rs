//! The traits between this crate, files, and guest memory; and their implementations for files and byte slices.

use std::{
    fmt,
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, FileTypeExt},
    },
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

/// The size of the buffer through which bytes are copied if a system call cannot copy them directly, in bytes.
const COPY_BUFFER_SIZE: usize = 64 << 10;

/// Bytes that can be read at any offset: a file, a block device, or bytes in memory.
pub trait ReadAt: fmt::Debug + Send + Sync {
    /// Reads bytes at `offset` into `buffer`. Returns their number, which is 0 at the end, and can be less than the
    /// size of `buffer`.
    ///
    /// # Errors
    ///
    /// The bytes cannot be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The size in bytes.
    ///
    /// # Errors
    ///
    /// The size cannot be read.
    fn size(&self) -> io::Result<u64>;

    /// A descriptor that has the same bytes at the same offsets, for system calls that copy them from or to guest
    /// memory. `None` if there is none: bytes are then copied through a buffer.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A file that can also be changed.
pub trait Storage: ReadAt {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// The bytes cannot be written. Some of them may have been.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Changes the size; new bytes are zeroes.
    ///
    /// # Errors
    ///
    /// The size cannot be changed.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Makes a range inside of the file read as zeroes. With `unmap`, its blocks may be freed; otherwise they are
    /// allocated.
    ///
    /// # Errors
    ///
    /// The range cannot be changed. A part of it may have been.
    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;

    /// Allocates the blocks of a range inside of the file, if the file system can.
    ///
    /// # Errors
    ///
    /// The blocks cannot be allocated.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Returns when all earlier changes are on stable storage.
    ///
    /// # Errors
    ///
    /// Some changes may be lost.
    fn sync_data(&self) -> io::Result<()>;
}

/// Memory that is filled from its start to its end, such as the buffers of a guest's read request.
pub trait Target {
    /// The number of bytes that are not filled yet.
    fn remaining(&self) -> usize;

    /// Fills at most `count` of the next bytes from `file` at `offset`, with one system call. Returns the number of
    /// bytes, which is 0 at the end of the file.
    ///
    /// # Errors
    ///
    /// The error of the system call.
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize>;

    /// Fills the next bytes with `bytes`, of which there are at most [`Target::remaining`].
    fn put(&mut self, bytes: &[u8]);
}

/// Memory that is consumed from its start to its end, such as the buffers of a guest's write request.
pub trait Source {
    /// The number of bytes that are not consumed yet.
    fn remaining(&self) -> usize;

    /// Writes at most `count` of the next bytes to `file` at `offset`, with one system call. Returns the number of
    /// bytes.
    ///
    /// # Errors
    ///
    /// The error of the system call.
    fn write_to(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize>;

    /// Copies the next bytes to `buffer`, which has room for at most [`Source::remaining`].
    fn take(&mut self, buffer: &mut [u8]);
}

/// Fills `buffer` from `offset`. Fails with [`io::ErrorKind::UnexpectedEof`] if `from` ends before.
pub(crate) fn read_exact_at(from: &dyn ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    match read_up_to(from, buffer, offset)? {
        count if count == buffer.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Fills `buffer` from `offset` until the end of `from`. Returns the number of bytes.
pub(crate) fn read_up_to(from: &dyn ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match retry_interrupted(|| from.read_at(&mut buffer[done..], offset.saturating_add(done as u64)))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Like [`read_exact_at`], but returns `None` if `from` ends before `buffer` is full.
pub(crate) fn read_exact_or_none(from: &dyn ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<Option<()>> {
    let count = read_up_to(from, buffer, offset)?;
    Ok((count == buffer.len()).then_some(()))
}

/// Fills the next `count` bytes of `target` from `offset`.
pub(crate) fn fill(target: &mut dyn Target, from: &dyn ReadAt, mut offset: u64, mut count: usize) -> io::Result<()> {
    if let Some(file) = from.descriptor() {
        while count > 0 {
            let read = retry_interrupted(|| target.read_from(file, offset, count))?;
            if read == 0 {
                return Err(truncated(offset.saturating_add(count as u64)));
            }
            offset += read as u64;
            count -= read;
        }
        return Ok(());
    }
    let mut buffer = vec![0; count.min(COPY_BUFFER_SIZE)];
    while count > 0 {
        let part = count.min(COPY_BUFFER_SIZE);
        read_exact_at(from, &mut buffer[..part], offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => truncated(offset.saturating_add(part as u64)),
            _ => error,
        })?;
        target.put(&buffer[..part]);
        offset += part as u64;
        count -= part;
    }
    Ok(())
}

/// Fills the next `count` bytes of `target` with zeroes.
pub(crate) fn fill_with_zeroes(target: &mut dyn Target, mut count: usize) {
    static ZEROES: [u8; COPY_BUFFER_SIZE] = [0; COPY_BUFFER_SIZE];
    while count > 0 {
        let part = count.min(ZEROES.len());
        target.put(&ZEROES[..part]);
        count -= part;
    }
}

/// Writes the next `count` bytes of `source` to `storage` at `offset`.
pub(crate) fn drain(
    source: &mut dyn Source,
    storage: &dyn Storage,
    mut offset: u64,
    mut count: usize,
) -> io::Result<()> {
    if let Some(file) = storage.descriptor() {
        while count > 0 {
            let written = retry_interrupted(|| source.write_to(file, offset, count))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += written as u64;
            count -= written;
        }
        return Ok(());
    }
    let mut buffer = vec![0; count.min(COPY_BUFFER_SIZE)];
    while count > 0 {
        let part = count.min(COPY_BUFFER_SIZE);
        source.take(&mut buffer[..part]);
        storage.write_all_at(&buffer[..part], offset)?;
        offset += part as u64;
        count -= part;
    }
    Ok(())
}

/// The error of a read for which the file must have at least `needed` bytes.
fn truncated(needed: u64) -> io::Error {
    io::Error::other(format!(
        "the file has less than {needed} bytes: it was truncated after it was opened"
    ))
}

/// Repeats `call` while a signal interrupts it.
fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The size of a regular file or block device in bytes. For a block device, this moves the position of the descriptor.
///
/// # Errors
///
/// The error of the system call.
pub fn file_size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        (&mut &*file).seek(SeekFrom::End(0))
    } else {
        Ok(metadata.len())
    }
}

/// Frees the blocks of a range of a regular file or block device, which then reads as zeroes. No-op if the host cannot
/// free them: to write zeroes instead would allocate all of them.
///
/// # Errors
///
/// The error of fallocate(2), except `EOPNOTSUPP`. A part of the range may have been freed.
pub fn discard_file_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match free_or_zero(file, offset, length, FallocateFlags::PUNCH_HOLE) {
        Err(error) if is_unsupported(&error) => Ok(()),
        other => other,
    }
}

/// Makes a range of a regular file or block device read as zeroes. With `unmap`, the host may free its blocks.
///
/// # Errors
///
/// The range cannot be changed. A part of it may have been.
pub fn zero_file_range(file: &File, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
    let mode = if unmap {
        FallocateFlags::PUNCH_HOLE
    } else {
        FallocateFlags::ZERO_RANGE
    };
    match free_or_zero(file, offset, length, mode) {
        // Write zeroes instead.
        Err(error) if is_unsupported(&error) => {
            static ZEROES: [u8; COPY_BUFFER_SIZE] = [0; COPY_BUFFER_SIZE];
            let mut done = 0;
            while done < length {
                let count = usize::try_from(length - done).unwrap_or(ZEROES.len()).min(ZEROES.len());
                FileExt::write_all_at(file, &ZEROES[..count], offset + done)?;
                done += count as u64;
            }
            Ok(())
        }
        other => other,
    }
}

/// Calls fallocate(2) with `mode`, which frees or zeroes a range, and `KEEP_SIZE`. Does nothing for an empty range, which
/// fallocate(2) refuses with `EINVAL`.
fn free_or_zero(file: &File, offset: u64, length: u64, mode: FallocateFlags) -> io::Result<()> {
    match length {
        0 => Ok(()),
        _ => retry_interrupted(|| Ok(fallocate(file, mode | FallocateFlags::KEEP_SIZE, offset, length)?)),
    }
}

/// Whether the host's file system or device does not support the operation of fallocate(2).
fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        file_size(self)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Storage for File {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        zero_file_range(self, offset, length, unmap)
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        match retry_interrupted(|| Ok(fallocate(self, FallocateFlags::KEEP_SIZE, offset, length)?)) {
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        let available = &self[start..];
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        Ok(count)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl Target for &mut [u8] {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let count = count.min(self.len());
        let read = rustix::io::pread(file, &mut self[..count], offset)?;
        *self = &mut std::mem::take(self)[read..];
        Ok(read)
    }

    fn put(&mut self, bytes: &[u8]) {
        let (filled, rest) = std::mem::take(self).split_at_mut(bytes.len());
        filled.copy_from_slice(bytes);
        *self = rest;
    }
}

impl Source for &[u8] {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn write_to(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let written = rustix::io::pwrite(file, &self[..count.min(self.len())], offset)?;
        *self = &self[written..];
        Ok(written)
    }

    fn take(&mut self, buffer: &mut [u8]) {
        let (taken, rest) = self.split_at(buffer.len());
        buffer.copy_from_slice(taken);
        *self = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file on which fallocate(2) fails with `EOPNOTSUPP` and pwrite(2) with `ESPIPE`, so that the error shows which
    /// of them was tried last.
    fn file_without_fallocate() -> File {
        File::options().write(true).open("/proc/thread-self/comm").unwrap()
    }

    #[test]
    fn discard_that_the_host_cannot_do_writes_nothing() {
        discard_file_range(&file_without_fallocate(), 0, 4096).unwrap();
    }

    #[test]
    fn zeroes_are_written_if_the_host_cannot_free_blocks() {
        for unmap in [false, true] {
            let write_error = zero_file_range(&file_without_fallocate(), 0, 4096, unmap).unwrap_err();
            // The error of pwrite(2), which shows that zeroes would have been written.
            assert_eq!(write_error.raw_os_error(), Some(Errno::SPIPE.raw_os_error()), "{unmap}");
        }
    }

    #[test]
    fn discarded_range_of_a_file_is_a_hole() {
        use std::os::unix::fs::MetadataExt;

        let file = tempfile::tempfile().unwrap();
        FileExt::write_all_at(&file, &[b'x'; 1 << 20], 0).unwrap();
        let blocks = file.metadata().unwrap().blocks();
        discard_file_range(&file, 4096, 1 << 19).unwrap();
        discard_file_range(&file, 0, 0).unwrap();
        assert!(file.metadata().unwrap().blocks() < blocks);
        let mut bytes = [1; 2];
        FileExt::read_exact_at(&file, &mut bytes, 4095).unwrap();
        assert_eq!(bytes, [b'x', 0]);
    }
}
