//! A descriptor chain's buffers, and the moves of bytes between them and descriptors of the host.
//!
//! The one place where guest memory meets system calls. A chain is parsed once: its lengths are
//! summed with checks, each buffer is resolved region by region, and a chain that the standard
//! forbids is [`ChainError`]. What the buffers hold may change under us at any time; nothing here
//! reads a byte twice.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::mm::{Advice, madvise};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use crate::memory::MemoryRegions;

/// The most buffers in a chain; also the most that one system call takes (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

const PAGE: usize = 4096;

/// Why a chain is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// A loop, an index beyond the table, a malformed indirect table, or lengths whose sum passes
    /// 2^32 (virtio 1.3 §2.7.5): the queue gave up before a last descriptor.
    #[error("the descriptor chain has no proper end")]
    Endless,
    /// A buffer lies outside of guest memory.
    #[error("a buffer of the descriptor chain lies outside of guest memory")]
    OutOfRange,
    /// A buffer to read stands behind one to write (virtio 1.3 §2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More buffers than one system call takes.
    #[error("the descriptor chain has more than {MAX_BUFFERS} buffers")]
    TooLong,
}

/// A parsed chain.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// What to give back to the driver.
    pub(crate) head: u16,
    /// What the driver wrote.
    pub(crate) readable: Buffers<'m>,
    /// Where the device writes.
    pub(crate) writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Parses what the driver made available.
    pub(crate) fn parse(
        chain: DescriptorChain<&'m MemoryRegions>,
        memory: &'m MemoryRegions,
    ) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut ended = false;
        for descriptor in chain {
            ended = !descriptor.has_next();
            let target = match (descriptor.is_write_only(), writable.slices.is_empty()) {
                (true, _) => &mut writable,
                (false, true) => &mut readable,
                (false, false) => return Err(ChainError::Order),
            };
            if descriptor.len() == 0 {
                continue;
            }
            let length = descriptor.len() as usize;
            if !memory.check_range(descriptor.addr(), length) {
                return Err(ChainError::OutOfRange);
            }
            let slices = GuestMemoryBackend::get_slices(memory, descriptor.addr(), length)
                .stop_on_error()
                .map_err(|_| ChainError::OutOfRange)?;
            target.slices.extend(slices);
            target.length += length;
            if target.slices.len() > MAX_BUFFERS {
                return Err(ChainError::TooLong);
            }
        }
        if ended {
            Ok(Self {
                head,
                readable,
                writable,
            })
        } else {
            Err(ChainError::Endless)
        }
    }
}

/// Buffers of guest memory in order, as one stream of bytes.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Buffers<'m> {
    /// A range of guest memory, as a chain would name it.
    pub(crate) fn over(memory: &'m MemoryRegions, address: u64, length: usize) -> Result<Self, ChainError> {
        let address = GuestAddress(address);
        if !memory.check_range(address, length) {
            return Err(ChainError::OutOfRange);
        }
        let slices = GuestMemoryBackend::get_slices(memory, address, length).stop_on_error();
        Ok(Self {
            slices: slices.map_err(|_| ChainError::OutOfRange)?.collect(),
            length,
        })
    }

    /// Puts `more` behind what there is; `false`, with nothing done, if it were more than one system call
    /// takes.
    #[must_use]
    pub(crate) fn append(&mut self, more: Self) -> bool {
        let fits = self.slices.len() + more.slices.len() <= MAX_BUFFERS;
        if fits {
            self.slices.extend(more.slices);
            self.length += more.length;
        }
        fits
    }

    /// How many bytes are left.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The first `count` bytes, or all there are. Takes nothing off.
    pub(crate) fn front(&self, count: usize) -> Self {
        let mut all = Self {
            slices: self.slices.clone(),
            length: self.length,
        };
        all.split_to(count)
    }

    /// Takes the first `count` bytes off, or all there are.
    pub(crate) fn split_to(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        while front.length < count
            && let Some(first) = self.slices.first().copied()
        {
            let wanted = count - front.length;
            let (part, rest) = match first.split_at(wanted) {
                Ok((part, rest)) if first.len() > wanted => (part, Some(rest)),
                _ => (first, None),
            };
            front.slices.push(part);
            front.length += part.len();
            self.length -= part.len();
            match rest {
                Some(rest) => self.slices[0] = rest,
                None => {
                    self.slices.remove(0);
                }
            }
        }
        front
    }

    /// Copies the next bytes out of guest memory into `target` and takes them off; `false`, with
    /// nothing taken, if there are fewer.
    #[must_use]
    pub(crate) fn take(&mut self, target: &mut [u8]) -> bool {
        if target.len() > self.length {
            return false;
        }
        let mut filled = 0;
        for slice in &self.split_to(target.len()).slices {
            filled += slice.copy_to(&mut target[filled..]);
        }
        true
    }

    /// Copies `bytes` into guest memory and takes that space off; returns how many fitted.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> usize {
        let space = self.split_to(bytes.len());
        let mut done = 0;
        for slice in &space.slices {
            let part = &bytes[done..done + slice.len()];
            slice.copy_from(part);
            done += part.len();
        }
        done
    }

    /// Fills guest memory from `source` with one system call, at `offset` or where a stream
    /// stands. Returns the count; 0 is end of file. Takes nothing off.
    pub(crate) fn read_from(&self, source: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let vectors = self.vectors();
        let count = libc::c_int::try_from(vectors.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let result = match file_offset(offset)? {
            // SAFETY: `vectors` names `count` ranges inside guest memory, mapped for as long as
            // 'm; that the guest may write them too is the nature of volatile memory, and Rust
            // holds no reference into it.
            Some(offset) => unsafe { libc::preadv(source.as_raw_fd(), vectors.as_ptr(), count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::readv(source.as_raw_fd(), vectors.as_ptr(), count) },
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes guest memory to `target` with one system call, at `offset` or where a stream
    /// stands. Returns the count. Takes nothing off.
    pub(crate) fn write_to(&self, target: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let vectors = self.vectors();
        let count = libc::c_int::try_from(vectors.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let result = match file_offset(offset)? {
            // SAFETY: `vectors` names `count` ranges inside guest memory, mapped for as long as 'm.
            Some(offset) => unsafe { libc::pwritev(target.as_raw_fd(), vectors.as_ptr(), count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::writev(target.as_raw_fd(), vectors.as_ptr(), count) },
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Gives the whole pages among them back to the host, of which they are in `memory`; they read as zeroes
    /// afterwards. Takes nothing off.
    ///
    /// # Errors
    ///
    /// The host refuses; a part may be done.
    pub(crate) fn discard(&self, memory: &MemoryRegions) -> io::Result<()> {
        // From a file it is taken for every process that has it mapped.
        let shared = memory
            .iter()
            .next()
            .is_some_and(|region| region.file_offset().is_some());
        let advice = if shared {
            Advice::LinuxRemove
        } else {
            Advice::LinuxDontNeed
        };
        for slice in &self.slices {
            let guard = slice.ptr_guard_mut();
            let start = guard.as_ptr();
            let skipped = start.align_offset(PAGE);
            let length = slice.len().saturating_sub(skipped) / PAGE * PAGE;
            if length > 0 {
                // SAFETY: the whole pages lie in the slice, which is guest memory that stays mapped for as
                // long as 'm and into which no Rust reference exists; what it holds is the guest's to give up.
                unsafe { madvise(start.wrapping_add(skipped).cast(), length, advice)? };
            }
        }
        Ok(())
    }

    fn vectors(&self) -> Vec<libc::iovec> {
        self.slices
            .iter()
            .take(MAX_BUFFERS)
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}

fn file_offset(offset: Option<u64>) -> io::Result<Option<libc::off_t>> {
    offset
        .map(|offset| libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into()))
        .transpose()
}
