//! The buffers of a descriptor chain, and the transfer of bytes between them and file descriptors of the host.
//!
//! Only this module passes guest memory to system calls on behalf of devices. A chain is parsed once, with checked
//! lengths and addresses; a chain that virtio forbids is a [`ChainError`]. The guest may change the content of a buffer
//! at any time, so no byte is read twice.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::mm::{Advice, madvise};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use crate::memory::MemoryRegions;

/// The maximum number of buffers of a chain in one direction, which is the limit of one system call (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

const PAGE_SIZE: usize = 4096;

/// Why a descriptor chain is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// A loop, an index beyond the table, a malformed indirect table, or lengths whose sum exceeds 2^32 (virtio 1.3
    /// §2.7.5): iteration stopped before the final descriptor.
    #[error("the descriptor chain is not terminated")]
    Unterminated,
    #[error("a buffer of the descriptor chain lies outside of guest memory")]
    OutOfRange,
    /// Forbidden by virtio 1.3 §2.7.4.2.
    #[error("a device-readable buffer follows a device-writable one")]
    ReadableAfterWritable,
    #[error("the descriptor chain has more than {MAX_BUFFERS} buffers")]
    TooManyBuffers,
}

/// A parsed descriptor chain.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// The index of the first descriptor. It identifies the chain in the used ring.
    pub(crate) head: u16,
    /// The device-readable buffers: data from the driver.
    pub(crate) readable: Buffers<'m>,
    /// The device-writable buffers: space for data to the driver.
    pub(crate) writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Parses an available chain, whose buffers lie in `memory`.
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
                (false, false) => return Err(ChainError::ReadableAfterWritable),
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
                return Err(ChainError::TooManyBuffers);
            }
        }
        if ended {
            Ok(Self {
                head,
                readable,
                writable,
            })
        } else {
            Err(ChainError::Unterminated)
        }
    }
}

/// A sequence of buffers in guest memory, used as one stream of bytes. Methods that consume bytes remove them from the
/// front.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Buffers<'m> {
    /// The range of `length` bytes of guest memory at `address`.
    pub(crate) fn from_range(memory: &'m MemoryRegions, address: u64, length: usize) -> Result<Self, ChainError> {
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

    /// Appends `more`. Returns `false` and appends nothing if the result would have more buffers than one system
    /// call takes.
    #[must_use]
    pub(crate) fn append(&mut self, more: Self) -> bool {
        let fits = self.slices.len() + more.slices.len() <= MAX_BUFFERS;
        if fits {
            self.slices.extend(more.slices);
            self.length += more.length;
        }
        fits
    }

    /// The number of remaining bytes.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Returns at most the first `count` bytes. Consumes nothing.
    pub(crate) fn prefix(&self, count: usize) -> Self {
        let mut all = Self {
            slices: self.slices.clone(),
            length: self.length,
        };
        all.split_to(count)
    }

    /// Consumes and returns at most the first `count` bytes.
    pub(crate) fn split_to(&mut self, count: usize) -> Self {
        let mut prefix = Self::default();
        while prefix.length < count
            && let Some(first) = self.slices.first().copied()
        {
            let wanted = count - prefix.length;
            let (part, remainder) = match first.split_at(wanted) {
                Ok((part, remainder)) if first.len() > wanted => (part, Some(remainder)),
                _ => (first, None),
            };
            prefix.slices.push(part);
            prefix.length += part.len();
            self.length -= part.len();
            match remainder {
                Some(remainder) => self.slices[0] = remainder,
                None => {
                    self.slices.remove(0);
                }
            }
        }
        prefix
    }

    /// Fills `target` from guest memory and consumes those bytes. Returns `false` and consumes nothing if there are too
    /// few.
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

    /// Copies `bytes` to guest memory and consumes that space. Returns the number of bytes that fitted.
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

    /// Reads from `source` into guest memory with one system call, at file offset `offset` or at the current position.
    /// Returns the number of bytes; 0 means end of file. Consumes nothing.
    pub(crate) fn read_from(&self, source: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        let count = libc::c_int::try_from(iovecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let result = match file_offset(offset)? {
            // SAFETY: `iovecs` contains `count` ranges of guest memory, which is mapped for as long as 'm. The guest
            // may write them at the same time, but no Rust reference into them exists.
            Some(offset) => unsafe { libc::preadv(source.as_raw_fd(), iovecs.as_ptr(), count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::readv(source.as_raw_fd(), iovecs.as_ptr(), count) },
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes guest memory to `target` with one system call, at file offset `offset` or at the current position.
    /// Returns the number of bytes. Consumes nothing.
    pub(crate) fn write_to(&self, target: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        let count = libc::c_int::try_from(iovecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let result = match file_offset(offset)? {
            // SAFETY: `iovecs` contains `count` ranges of guest memory, which is mapped for as long as 'm.
            Some(offset) => unsafe { libc::pwritev(target.as_raw_fd(), iovecs.as_ptr(), count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::writev(target.as_raw_fd(), iovecs.as_ptr(), count) },
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Returns all whole pages of the buffers to the host. Afterwards they read as zeroes or, where a file is mapped
    /// privately, as the file. The buffers must lie in `memory`. Consumes nothing.
    ///
    /// # Errors
    ///
    /// `madvise` failed; some pages may already be discarded.
    pub(crate) fn discard(&self, memory: &MemoryRegions) -> io::Result<()> {
        // MADV_REMOVE frees pages of the memory's file, for every process that maps it.
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
            let skipped = start.align_offset(PAGE_SIZE);
            let length = slice.len().saturating_sub(skipped) / PAGE_SIZE * PAGE_SIZE;
            if length > 0 {
                // SAFETY: the pages lie in the slice, which is guest memory, mapped for as long as 'm. No Rust
                // reference into it exists, and the guest has given up its content.
                unsafe { madvise(start.wrapping_add(skipped).cast(), length, advice)? };
            }
        }
        Ok(())
    }

    fn iovecs(&self) -> Vec<libc::iovec> {
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use arbtest::{arbitrary, arbtest};
    use vm_memory::Bytes;

    use super::*;

    /// The end of guest memory: two regions without a gap, and one after a gap.
    const END: u64 = 0x6000;
    const REGIONS: [(GuestAddress, usize); 3] = [
        (GuestAddress(0), 0x1000),
        (GuestAddress(0x1000), 0x1000),
        (GuestAddress(0x4000), 0x2000),
    ];

    fn is_memory(address: u64) -> bool {
        let contains = |(start, length): &(GuestAddress, usize)| (start.0..start.0 + *length as u64).contains(&address);
        REGIONS.iter().any(contains)
    }

    /// Makes buffers of several ranges, and the addresses of their bytes in order.
    fn make_buffers<'m>(
        memory: &'m MemoryRegions,
        input: &mut arbitrary::Unstructured<'_>,
    ) -> arbitrary::Result<(Buffers<'m>, VecDeque<u64>)> {
        let (mut buffers, mut addresses) = (Buffers::default(), VecDeque::new());
        for _ in 0..input.int_in_range(0..=4)? {
            let start = input.int_in_range(0..=END)?;
            let length = input.int_in_range(0..=0x1800)?;
            let range = start..start + length as u64;
            match Buffers::from_range(memory, start, length) {
                Ok(more) => {
                    assert!(buffers.append(more));
                    addresses.extend(range.clone());
                    assert!(range.clone().all(is_memory), "{range:?}");
                }
                Err(error) => {
                    assert_eq!(error, ChainError::OutOfRange);
                    assert!(!range.clone().all(is_memory) || length == 0, "{range:?}");
                }
            }
        }
        Ok((buffers, addresses))
    }

    #[test]
    fn bytes_of_any_ranges_are_one_stream() {
        let memory = MemoryRegions::from_ranges(&REGIONS).unwrap();
        arbtest(|input| {
            let (mut buffers, mut addresses) = make_buffers(&memory, input)?;
            for _ in 0..input.int_in_range(0..=8)? {
                // Often at the end of the bytes.
                let count = match input.arbitrary()? {
                    true => addresses.len().saturating_add_signed(input.int_in_range(-2..=2)?),
                    false => input.int_in_range(0..=0x2000)?,
                };
                let fitting = count.min(addresses.len());
                let read = |address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
                match input.int_in_range(0..=3)? {
                    0 => {
                        let byte: u8 = input.arbitrary()?;
                        assert_eq!(buffers.put(&vec![byte; count]), fitting);
                        assert!(addresses.drain(..fitting).all(|address| read(address) == byte));
                    }
                    1 => {
                        let mut taken = vec![0; count];
                        let is_enough = buffers.take(&mut taken);
                        assert_eq!(is_enough, fitting == count);
                        if is_enough {
                            assert!(addresses.drain(..count).map(read).eq(taken));
                        }
                    }
                    2 => {
                        assert_eq!(buffers.split_to(count).len(), fitting);
                        addresses.drain(..fitting);
                    }
                    _ => assert_eq!(buffers.prefix(count).len(), fitting),
                }
                assert_eq!(buffers.len(), addresses.len());
                let sum: usize = buffers.slices.iter().map(VolatileSlice::len).sum();
                assert_eq!(sum, addresses.len());
            }
            Ok(())
        })
        .size_max(512)
        .budget_ms(500);
    }
}
