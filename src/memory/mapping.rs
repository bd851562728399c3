//! Host mappings of guest memory.
//!
//! A machine without an fs process has private anonymous memory. One with an fs process has a memfd that both processes
//! map.

use std::{fs::File, io, sync::Arc};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous},
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionBuilder,
};

use super::{
    error::MemoryError,
    layout::{HUGE_PAGE_SIZE, ram_ranges},
    regions::MemoryRegions,
};

/// Maps `bytes` of boot memory. If `shared`, the memory is a file that another process can map.
pub(crate) fn allocate(bytes: u64, shared: bool) -> Result<MemoryRegions, MemoryError> {
    if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE_SIZE) {
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
    for (base, length) in ram_ranges(bytes) {
        let region = map_region(length, file.as_ref(), offset).map_err(failed)?;
        let region =
            GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}

/// Returns `memory` with one more region of `length` bytes at guest address `base`, above all existing regions. In
/// shared memory, the region extends the same file.
pub(crate) fn add_region(memory: &MemoryRegions, base: u64, length: u64) -> Result<MemoryRegions, MemoryError> {
    let failed = |source: io::Error| MemoryError::Map { bytes: length, source };
    let file = memory.iter().next().and_then(|region| region.file_offset());
    let old_size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if let Some(file) = file {
        ftruncate(file.file(), old_size + length).map_err(|error| failed(error.into()))?;
    }
    let region = map_region(length, file.map(FileOffset::file), old_size).map_err(failed)?;
    let region = GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
    memory
        .insert_region(Arc::new(region))
        .map_err(|error| failed(io::Error::other(error)))
}

fn backing_file(bytes: u64) -> io::Result<File> {
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    // The file server has this file too. If it could shrink the file, the vmm would get SIGBUS. Growth is not sealed,
    // because the vmm extends the file.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
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

    use super::*;

    #[test]
    fn size_that_is_not_a_multiple_of_2_mib_is_refused() {
        for bytes in [0, 1, 4096, (2 << 20) + 4096] {
            assert!(matches!(allocate(bytes, false), Err(MemoryError::Size(_))), "{bytes}");
        }
    }

    #[test]
    fn memory_that_is_shared_cannot_be_truncated() {
        let memory = allocate(2 << 20, true).unwrap();
        let file = memory.iter().find_map(|region| region.file_offset()).unwrap().file();
        assert_eq!(ftruncate(file, 4096), Err(rustix::io::Errno::PERM));
        assert_eq!(fcntl_add_seals(file, SealFlags::WRITE), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn added_region_extends_the_same_file_and_keeps_existing_content() {
        for shared in [false, true] {
            let memory = allocate(2 << 20, shared).unwrap();
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
            let expected = [0, 2 << 20, 4 << 20].map(|offset| shared.then_some(offset));
            assert_eq!(offsets, expected);
        }
    }
}
