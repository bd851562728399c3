//! Guest memory: where it lies in guest physical space, and what backs it.
//!
//! The one leaf that maps memory by hand: a machine without an fs process has private anonymous
//! memory over which the kernel's text and the initramfs are mapped copy-on-write; one with an fs process has a memfd
//! that both map, into which the kernel is copied.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous},
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, mmap::MmapRegionBuilder,
};

use super::Memory;
use crate::control::Extent;

/// Guest physical addresses of devices, where no memory lies: the last GiB below 4 GiB.
pub(crate) const MMIO: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// Both what huge pages want and what sizes are multiples of.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

const PAGE: u64 = 4096;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The host refused.
    #[error("{bytes} bytes of guest memory: {source}")]
    Map {
        /// How much.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The size makes no machine.
    #[error("guest memory of {0} bytes: it must be a positive multiple of 2 MiB")]
    Size(u64),
    /// A file cannot be brought into memory.
    #[error("the guest's {what} does not fit into its memory at {address:#x}: {source}")]
    Load {
        /// Which file.
        what: &'static str,
        /// Where it should go.
        address: u64,
        /// Why.
        source: io::Error,
    },
}

/// Maps `bytes` of memory, shareable with another process if `shared`.
pub(crate) fn allocate(bytes: u64, shared: bool) -> Result<Memory, MemoryError> {
    if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE) {
        return Err(MemoryError::Size(bytes));
    }
    let failed = |source: io::Error| MemoryError::Map { bytes, source };
    let file = if shared {
        Some(backing_file(bytes).map_err(failed)?)
    } else {
        None
    };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (base, length) in ranges(bytes) {
        let region = map_region(length, file.as_ref(), offset).map_err(failed)?;
        let region =
            GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}

/// `memory`, and `length` bytes more at guest address `base`, behind all that there is. The bytes come from
/// the same file, if there is one.
pub(crate) fn extend(memory: &Memory, base: u64, length: u64) -> Result<Memory, MemoryError> {
    let failed = |source: io::Error| MemoryError::Map { bytes: length, source };
    let file = memory.iter().next().and_then(|region| region.file_offset());
    let before: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if let Some(file) = file {
        ftruncate(file.file(), before + length).map_err(|error| failed(error.into()))?;
    }
    let region = map_region(length, file.map(FileOffset::file), before).map_err(failed)?;
    let region = GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
    memory
        .insert_region(Arc::new(region))
        .map_err(|error| failed(io::Error::other(error)))
}

/// Where memory of this size lies: below [`MMIO`], and the rest from 4 GiB on.
pub(crate) fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(MMIO.start);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((MMIO.end, bytes - low));
    }
    ranges
}

/// Whether the guest will write what it finds loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Few pages or none: they can be the host's page cache, shared by all guests.
    Read,
    /// Most pages: a mapping would cost each of them three faults and a copy, one after the other.
    Write,
}

/// Brings `extent` of `file` to guest address `address`: by mapping the whole pages where the memory
/// is private and the guest mostly reads them, else by a copy.
pub(crate) fn load(
    memory: &Memory,
    what: &'static str,
    file: &File,
    extent: Extent,
    address: u64,
    access: Access,
) -> Result<(), MemoryError> {
    let failed = |source: io::Error| MemoryError::Load { what, address, source };
    let length = usize::try_from(extent.length).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
    if !memory.check_range(GuestAddress(address), length) {
        return Err(failed(io::ErrorKind::OutOfMemory.into()));
    }
    let private = memory
        .find_region(GuestAddress(address))
        .is_some_and(|region| region.file_offset().is_none());
    let aligned = address.is_multiple_of(PAGE) && extent.offset.is_multiple_of(PAGE);
    let mapped = if private && aligned && access == Access::Read {
        let whole = extent.length - extent.length % PAGE;
        map_file(memory, file, extent.offset, whole, address).map_err(failed)?;
        whole
    } else {
        0
    };
    copy(
        memory,
        file,
        extent.offset + mapped,
        extent.length - mapped,
        address + mapped,
    )
    .map_err(failed)
}

/// Copies `length` bytes of `file` from `offset` on to guest address `address`, where there is memory.
fn copy(memory: &Memory, file: &File, offset: u64, length: u64, address: u64) -> io::Result<()> {
    let region = memory.find_region(GuestAddress(address));
    let backing = region.and_then(|region| Some((region.file_offset()?, region)));
    let Some((backing, region)) = backing else {
        let mut source = file.try_clone()?;
        io::Seek::seek(&mut source, io::SeekFrom::Start(offset))?;
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
        return memory
            .read_exact_volatile_from(GuestAddress(address), &mut source, length)
            .map_err(io::Error::other);
    };
    // By the file and not by its mapping, where the kernel would fill each page with zeroes first.
    let inside = address - region.start_addr().0;
    if length > region.len() - inside {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    rustix::fs::seek(backing.file(), rustix::fs::SeekFrom::Start(backing.start() + inside))?;
    let mut offset = offset;
    let end = offset + length;
    while offset < end {
        let rest = usize::try_from(end - offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if rustix::fs::sendfile(backing.file(), file, Some(&mut offset), rest)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn backing_file(bytes: u64) -> io::Result<File> {
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    Ok(File::from(file))
}

fn map_region(length: u64, file: Option<&File>, offset: u64) -> io::Result<MmapRegion<()>> {
    let size = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
    if let Some(file) = file {
        return MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone()?, offset))
            .build()
            .map_err(io::Error::other);
    }
    // Two MiB more, so that the region can start at a huge page.
    let huge = usize::try_from(HUGE_PAGE).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing else.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            size + huge,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let start = start.map_addr(|address| address.next_multiple_of(huge));
    // SAFETY: `start..start + size` lies inside the mapping made above. Advice changes no content.
    // A host without huge pages refuses, which costs speed and nothing else.
    let _ = unsafe { madvise(start, size, Advice::LinuxHugepage) };
    // SAFETY: `start..start + size` lies inside the mapping made above, which is never unmapped:
    // guest memory lives as long as the process.
    let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(start.cast()) };
    builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)
}

/// Maps whole pages of `file` copy-on-write over guest memory at `address`.
fn map_file(memory: &Memory, file: &File, offset: u64, length: u64, address: u64) -> io::Result<()> {
    let size = usize::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
    if size == 0 {
        return Ok(());
    }
    let slice = memory
        .get_slice(GuestAddress(address), size)
        .map_err(io::Error::other)?;
    let target = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the slice check above proves that `target..target + size` lies inside one region of
    // guest memory, which this process mapped and to whose content no Rust reference exists; the
    // new mapping has the same size, protection and lifetime.
    let mapped = unsafe {
        mmap(
            target.cast(),
            size,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file.as_fd(),
            offset,
        )
    };
    mapped.map(drop).map_err(|error| {
        io::Error::new(
            io::Error::from(error).kind(),
            format!("mapping descriptor {}: {error}", file.as_raw_fd()),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn memory_leaves_the_device_window_free() {
        let gib = 1 << 30;
        let cases = [
            (256 << 20, vec![(0, 256 << 20)]),
            (3 * gib, vec![(0, 3 * gib)]),
            (5 * gib, vec![(0, 3 * gib), (4 * gib, 2 * gib)]),
        ];
        for (bytes, expected) in cases {
            assert_eq!(ranges(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn sizes_that_are_no_multiple_of_two_mib_are_refused() {
        for bytes in [0, 1, 4096, (2 << 20) + 4096] {
            assert!(matches!(allocate(bytes, false), Err(MemoryError::Size(_))), "{bytes}");
        }
    }

    #[test]
    fn loaded_file_reads_the_same_in_private_and_shared_memory_and_is_not_written_back() {
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let ways = [
            (false, Access::Read),
            (false, Access::Write),
            (true, Access::Read),
            (true, Access::Write),
        ];
        for (shared, access) in ways {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[0; 4096]).unwrap();
            file.write_all(&content).unwrap();
            let memory = allocate(4 << 20, shared).unwrap();
            let extent = Extent {
                offset: 4096,
                length: 10_000,
            };

            load(&memory, "kernel", &file, extent, 0x10_0000, access).unwrap();

            let mut read = vec![0; content.len() + 1];
            memory.read_slice(&mut read, GuestAddress(0x10_0000)).unwrap();
            assert_eq!(read[..content.len()], content, "shared: {shared}, {access:?}");
            assert_eq!(read[content.len()], 0, "what follows stays zero");
            memory.write_slice(b"guest", GuestAddress(0x10_0000)).unwrap();
            let mut kept = [0; 5];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 4096).unwrap();
            assert_eq!(kept, content[..5]);
        }
    }

    #[test]
    fn memory_that_is_added_is_of_the_same_file_and_what_was_there_stays() {
        for shared in [false, true] {
            let memory = allocate(2 << 20, shared).unwrap();
            memory.write_obj(7_u8, GuestAddress(0)).unwrap();

            let once = extend(&memory, 4 << 30, 2 << 20).unwrap();
            once.write_obj(8_u8, GuestAddress(4 << 30)).unwrap();
            let twice = extend(&once, (4 << 30) + (2 << 20), 4 << 20).unwrap();

            assert_eq!(twice.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
            assert_eq!(twice.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 8);
            assert!(twice.check_range(GuestAddress(4 << 30), 6 << 20));
            assert!(!once.check_range(GuestAddress(4 << 30), 6 << 20));
            let offsets: Vec<_> = twice
                .iter()
                .map(|region| region.file_offset().map(FileOffset::start))
                .collect();
            let expected = [0, 2 << 20, 4 << 20].map(|offset| shared.then_some(offset));
            assert_eq!(offsets, expected);
        }
    }

    #[test]
    fn file_that_does_not_fit_is_refused() {
        let memory = allocate(2 << 20, false).unwrap();
        let extent = Extent {
            offset: 0,
            length: 3 << 20,
        };
        let file = tempfile::tempfile().unwrap();
        let error = load(&memory, "initramfs", &file, extent, 0, Access::Read).unwrap_err();
        assert!(error.to_string().contains("initramfs"), "{error}");
    }
}
