//! Host mappings of guest memory.
//!
//! A machine without an fs process has private anonymous memory. One with an fs process has a file that both processes
//! map (see [`super::backing_file`]).

use std::{fs::File, io, ops::Range, sync::Arc};

use rustix::{
    fs::ftruncate,
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous},
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionBuilder,
};

use super::{
    backing_file::create_sealed_file,
    error::MemoryError,
    layout::{HUGE_PAGE_SIZE, ram_ranges},
    regions::MemoryRegions,
};

/// Maps `bytes` of boot memory: the empty file `shared`, which another process can map too, or else private memory.
pub(crate) fn allocate(bytes: u64, shared: Option<File>) -> Result<MemoryRegions, MemoryError> {
    if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE_SIZE) {
        return Err(MemoryError::Size(bytes));
    }
    let failed = |source: io::Error| MemoryError::Map { bytes, source };
    if let Some(file) = &shared {
        ftruncate(file, bytes).map_err(|error| failed(error.into()))?;
    }
    let mut offset = 0;
    let mut regions = Vec::new();
    for (base, length) in ram_ranges(bytes) {
        let region = map_region(length, shared.as_ref(), offset).map_err(failed)?;
        let region =
            GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(beyond_address_space(base)))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}

/// Returns `memory` with one more region of `length` bytes at guest address `base`, above all existing regions. If
/// `memory` is shared, the region is a sealed file of its own.
pub(crate) fn add_region(memory: &MemoryRegions, base: u64, length: u64) -> Result<MemoryRegions, MemoryError> {
    let failed = |source: io::Error| MemoryError::Map { bytes: length, source };
    let file = if memory.iter().any(|region| region.file_offset().is_some()) {
        let file = create_sealed_file().map_err(failed)?;
        ftruncate(&file, length).map_err(|error| failed(error.into()))?;
        Some(file)
    } else {
        None
    };
    let region = map_region(length, file.as_ref(), 0).map_err(failed)?;
    let region = GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(beyond_address_space(base)))?;
    memory
        .insert_region(Arc::new(region))
        .map_err(|error| failed(io::Error::other(error)))
}

fn beyond_address_space(base: u64) -> io::Error {
    io::Error::other(format!("a region at {base:#x} would exceed the address space"))
}

/// Asks the host for huge pages in `range` of shared memory, which the guest is expected to fill, and in the rest of the
/// first and last huge page. A host that has none ignores this, which only costs speed. Private memory stays as it is:
/// [`allocate`] has asked for huge pages everywhere.
pub(crate) fn advise_huge_pages(memory: &MemoryRegions, range: Range<u64>) {
    let start = range.start - range.start % HUGE_PAGE_SIZE;
    let is_shared = |region: &GuestRegionMmap| region.file_offset().is_some();
    let Some(slice) = range
        .end
        .checked_next_multiple_of(HUGE_PAGE_SIZE)
        .and_then(|end| usize::try_from(end.checked_sub(start)?).ok())
        .filter(|_| memory.find_region(GuestAddress(start)).is_some_and(is_shared))
        .and_then(|length| memory.get_slice(GuestAddress(start), length).ok())
    else {
        return;
    };
    // SAFETY: `get_slice` has checked that the slice lies inside one region of guest memory, which is never unmapped.
    // Advice changes no content.
    let _ = unsafe {
        madvise(
            slice.ptr_guard_mut().as_ptr().cast(),
            slice.len(),
            Advice::LinuxHugepage,
        )
    };
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
    // 2 MiB more than needed, so that the region can start at a huge page boundary.
    let huge = usize::try_from(HUGE_PAGE_SIZE).map_err(|_| io::ErrorKind::OutOfMemory)?;
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
    // The call fails on a host without huge pages, which only costs speed.
    let _ = unsafe { madvise(start, size, Advice::LinuxHugepage) };
    // SAFETY: `start..start + size` lies inside the mapping made above, which is never unmapped: guest memory lives as
    // long as the process.
    let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(start.cast()) };
    builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use rustix::{
        fs::{SealFlags, fcntl_add_seals},
        io::Errno,
    };

    use super::*;

    #[test]
    fn size_that_is_not_a_multiple_of_2_mib_is_refused() {
        for bytes in [0, 1, 4096, (2 << 20) + 4096] {
            assert!(matches!(allocate(bytes, None), Err(MemoryError::Size(_))), "{bytes}");
        }
    }

    #[test]
    fn sealed_file_cannot_be_truncated() {
        let memory = allocate(2 << 20, Some(create_sealed_file().unwrap())).unwrap();
        let file = memory.iter().find_map(|region| region.file_offset()).unwrap().file();
        assert_eq!(ftruncate(file, 4096), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(file, SealFlags::WRITE), Err(Errno::PERM));
    }

    #[test]
    fn added_region_keeps_existing_content_and_is_a_file_of_its_own_if_memory_is_shared() {
        for shared in [false, true] {
            let memory = allocate(2 << 20, shared.then(|| create_sealed_file().unwrap())).unwrap();
            memory.write_obj(7_u8, GuestAddress(0)).unwrap();

            let grown = add_region(&memory, 4 << 30, 2 << 20).unwrap();
            grown.write_obj(8_u8, GuestAddress(4 << 30)).unwrap();
            let grown_twice = add_region(&grown, (4 << 30) + (2 << 20), 4 << 20).unwrap();

            assert_eq!(grown_twice.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
            assert_eq!(grown_twice.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 8);
            assert!(grown_twice.check_range(GuestAddress(4 << 30), 6 << 20));
            assert!(!grown.check_range(GuestAddress(4 << 30), 6 << 20));
            let offsets: Vec<_> = grown_twice
                .iter()
                .map(|region| region.file_offset().map(FileOffset::start))
                .collect();
            let expected = [0, 0, 0].map(|offset| shared.then_some(offset));
            assert_eq!(offsets, expected);
        }
    }
}
