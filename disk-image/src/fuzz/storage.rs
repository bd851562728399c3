//! A file in memory.

use std::{io, sync::Arc};

use parking_lot::Mutex;

use crate::{ReadAt, Storage};

/// A file whose clones share their content, and whose changes can fail.
#[derive(Debug, Clone, Default)]
pub(super) struct MemoryFile(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// The number of changes that succeed before the next one fails.
    until_failure: Option<u32>,
}

impl MemoryFile {
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State {
            bytes,
            until_failure: None,
        })))
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.0.lock().bytes.clone()
    }

    /// Makes one change fail, after `count` that succeed. `None` removes the failure.
    pub(super) fn fail_after(&self, count: Option<u32>) {
        self.0.lock().until_failure = count;
    }

    /// Calls `change` with the content, or fails.
    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.0.lock();
        match state.until_failure {
            Some(0) => {
                state.until_failure = None;
                return Err(io::ErrorKind::StorageFull.into());
            }
            Some(count) => state.until_failure = Some(count - 1),
            None => {}
        }
        change(&mut state.bytes);
        Ok(())
    }
}

impl ReadAt for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.lock().bytes.read_at(buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.lock().bytes.size()
    }
}

/// A write or zeroing outside of the file panics, which fails the fuzz target: the code under test must set the size
/// first.
impl Storage for MemoryFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.change(|content| content[start..start + bytes.len()].copy_from_slice(bytes))
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.change(|content| content.resize(usize::try_from(size).unwrap(), 0))
    }

    fn zero(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        let (start, length) = (usize::try_from(offset).unwrap(), usize::try_from(length).unwrap());
        self.change(|content| content[start..start + length].fill(0))
    }

    fn allocate(&self, _offset: u64, _length: u64) -> io::Result<()> {
        self.change(|_| {})
    }

    fn sync_data(&self) -> io::Result<()> {
        self.change(|_| {})
    }
}
