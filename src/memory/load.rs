//! Loads the guest's kernel and initramfs: maps or copies parts of a file into guest memory.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    error::MemoryError,
    layout::{HUGE_PAGE_SIZE, PAGE_SIZE},
    regions::MemoryRegions,
};

/// A part of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extent {
    /// [`load_file`] maps pages of the part only if this is a multiple of the page size.
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// How the guest will use loaded pages, which decides between a mapping and a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpectedAccess {
    /// The guest writes few pages or none: they can stay in the host's page cache, which all guests share.
    ReadMostly,
    /// The guest writes most pages: in a mapping, each of them would cost three faults and a copy.
    WriteMostly,
}

/// Loads `extent` of `file` at guest address `address`. Maps the whole pages if the memory is private and the guest
/// mostly reads them, and copies everything else. `what` names the file in errors.
pub(crate) fn load_file(
    memory: &MemoryRegions,
    what: &'static str,
    file: &File,
    extent: Extent,
    address: u64,
    access: ExpectedAccess,
) -> Result<(), MemoryError> {
    let failed = |source: io::Error| MemoryError::Load { what, address, source };
    let length = usize::try_from(extent.length).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
    if !memory.check_range(GuestAddress(address), length) {
        return Err(failed(too_small()));
    }
    let private = memory
        .find_region(GuestAddress(address))
        .is_some_and(|region| region.file_offset().is_none());
    let aligned = address.is_multiple_of(PAGE_SIZE) && extent.offset.is_multiple_of(PAGE_SIZE);
    let mapped = if private && aligned && access == ExpectedAccess::ReadMostly {
        let whole = extent.length - extent.length % PAGE_SIZE;
        map_file(memory, file, extent.offset, whole, address).map_err(failed)?;
        whole
    } else {
        0
    };
    copy_file(
        memory,
        file,
        extent.offset + mapped,
        extent.length - mapped,
        address + mapped,
    )
    .map_err(failed)
}

fn too_small() -> io::Error {
    io::Error::other("it does not fit there: give the machine more memory")
}

/// Copies `length` bytes of `file`, from `offset` on, to guest address `address`, which must be memory.
fn copy_file(memory: &MemoryRegions, file: &File, offset: u64, length: u64, address: u64) -> io::Result<()> {
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
    let inside = address - region.start_addr().0;
    if length > region.len() - inside {
        return Err(too_small());
    }
    // Where huge pages are advised, only an access to the mapping allocates them.
    let mut unallocated = address;
    while unallocated < address + length {
        memory
            .write_obj(0_u8, GuestAddress(unallocated))
            .map_err(io::Error::other)?;
        unallocated = (unallocated + 1).next_multiple_of(HUGE_PAGE_SIZE);
    }
    // Write the content to the file and not to the mapping, where the host's kernel would zero each small page first.
    rustix::fs::seek(backing.file(), rustix::fs::SeekFrom::Start(backing.start() + inside))?;
    let mut offset = offset;
    let end = offset + length;
    while offset < end {
        let remaining = usize::try_from(end - offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if rustix::fs::sendfile(backing.file(), file, Some(&mut offset), remaining)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Maps whole pages of `file` copy-on-write over guest memory at `address`.
fn map_file(memory: &MemoryRegions, file: &File, offset: u64, length: u64, address: u64) -> io::Result<()> {
    let size = usize::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
    if size == 0 {
        return Ok(());
    }
    let slice = memory
        .get_slice(GuestAddress(address), size)
        .map_err(io::Error::other)?;
    let target = slice.ptr_guard_mut().as_ptr();
    // SAFETY: `get_slice` has checked that `target..target + size` lies inside one region of guest memory. This
    // process mapped it, no Rust reference into it exists, and the new mapping has the same size, protection and
    // lifetime.
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
    use crate::memory::{allocate, create_sealed_file};

    #[test]
    fn loaded_file_is_equal_in_private_and_shared_memory_and_is_not_written_back_cve_2020_2025() {
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let cases = [
            (false, ExpectedAccess::ReadMostly),
            (false, ExpectedAccess::WriteMostly),
            (true, ExpectedAccess::ReadMostly),
            (true, ExpectedAccess::WriteMostly),
        ];
        for (shared, access) in cases {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[0; 4096]).unwrap();
            file.write_all(&content).unwrap();
            let memory = allocate(4 << 20, shared.then(|| create_sealed_file().unwrap())).unwrap();
            let extent = Extent {
                offset: 4096,
                length: 10_000,
            };

            load_file(&memory, "kernel", &file, extent, 0x10_0000, access).unwrap();

            let mut read = vec![0; content.len() + 1];
            memory.read_slice(&mut read, GuestAddress(0x10_0000)).unwrap();
            assert_eq!(read[..content.len()], content, "shared: {shared}, {access:?}");
            assert_eq!(read[content.len()], 0, "memory after the file stays zero");
            memory.write_slice(b"guest", GuestAddress(0x10_0000)).unwrap();
            let mut kept = [0; 5];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 4096).unwrap();
            assert_eq!(kept, content[..5]);
        }
    }

    #[test]
    fn file_that_does_not_fit_is_refused() {
        let memory = allocate(2 << 20, None).unwrap();
        let extent = Extent {
            offset: 0,
            length: 3 << 20,
        };
        let file = tempfile::tempfile().unwrap();
        let error = load_file(&memory, "initramfs", &file, extent, 0, ExpectedAccess::ReadMostly).unwrap_err();
        assert!(error.to_string().contains("initramfs"), "{error}");
    }
}
