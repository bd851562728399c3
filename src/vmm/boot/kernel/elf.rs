//! Loads an uncompressed ELF `vmlinux`: each segment at its physical address.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::image::{Image, KernelError, LoadedKernel};
use crate::{
    memory::{ExpectedAccess, MemoryRegions, advise_huge_pages, load_file},
    vmm::boot::layout::HIGH_MEMORY_START,
};

/// The magic number of an ELF file.
const MAGIC: [u8; 4] = *b"\x7fELF";
/// The size of an ELF file header, in bytes.
const FILE_HEADER_SIZE: usize = 64;
/// The size of a program header, in bytes.
const PROGRAM_HEADER_SIZE: usize = 56;
/// The maximum number of program headers. A kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// `PT_LOAD`: the type of a segment that is loaded.
const PT_LOAD: u32 = 1;
/// `PF_W`: the flag of a writable segment.
const PF_W: u32 = 2;

pub(super) fn is_elf(image: &Image<'_>) -> Result<bool, KernelError> {
    let mut magic = [0; MAGIC.len()];
    Ok(image.read(0, &mut magic)? && magic == MAGIC)
}

pub(super) fn load(memory: &MemoryRegions, image: &Image<'_>) -> Result<LoadedKernel, KernelError> {
    let mut header = [0; FILE_HEADER_SIZE];
    read(image, 0, &mut header)?;
    if header[..6] != *b"\x7fELF\x02\x01" || u16_at(&header, 18) != 62 {
        return Err(KernelError::Elf("it has no ELF header of a 64-bit x86 program"));
    }
    let (entry, table, size, count) = (
        u64_at(&header, 24),
        u64_at(&header, 32),
        u16_at(&header, 54),
        u16_at(&header, 56),
    );
    if usize::from(size) != PROGRAM_HEADER_SIZE || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Elf(
            "it has program headers of an unknown size or too many",
        ));
    }
    let mut headers = vec![0; PROGRAM_HEADER_SIZE * usize::from(count)];
    read(image, table, &mut headers)?;
    let mut end = 0;
    for segment in headers
        .chunks_exact(PROGRAM_HEADER_SIZE)
        .filter(|header| u32_at(header, 0) == PT_LOAD && u64_at(header, 40) > 0)
    {
        end = end.max(load_segment(memory, image, segment)?);
    }
    if !(HIGH_MEMORY_START..end).contains(&entry) {
        return Err(KernelError::Elf("its entry point lies outside of its segments"));
    }
    Ok(LoadedKernel {
        entry,
        end,
        setup: None,
    })
}

/// Loads the segment that the program header `header` describes. Returns the first address after it.
fn load_segment(memory: &MemoryRegions, image: &Image<'_>, header: &[u8]) -> Result<u64, KernelError> {
    let (offset, address) = (u64_at(header, 8), u64_at(header, 24));
    let (file_size, memory_size) = (u64_at(header, 32), u64_at(header, 40));
    let part = image.part(offset, file_size).filter(|_| file_size <= memory_size);
    let end = address
        .checked_add(memory_size)
        .filter(|_| address >= HIGH_MEMORY_START);
    let (Some(part), Some(end)) = (part, end) else {
        return Err(KernelError::Elf("a segment lies outside of the file or of memory"));
    };
    let access = if u32_at(header, 4) & PF_W == 0 {
        ExpectedAccess::ReadMostly
    } else {
        ExpectedAccess::WriteMostly
    };
    advise_huge_pages(memory, address..end);
    load_file(memory, "kernel", image.file, part, address, access)?;
    // The remainder of the segment must be zero, as new memory is. Check that it lies in guest memory.
    if memory.read_obj::<u8>(GuestAddress(end - 1)).is_err() {
        return Err(KernelError::TooLarge {
            address,
            bytes: memory_size,
            end: memory.last_addr().0 + 1,
        });
    }
    Ok(end)
}

fn read(image: &Image<'_>, offset: u64, target: &mut [u8]) -> Result<(), KernelError> {
    if image.read(offset, target)? {
        Ok(())
    } else {
        Err(KernelError::Elf("it is truncated"))
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{control::Extent, memory::allocate};

    /// An ELF file with one segment, of 8 bytes in the file and `memory_size` bytes in memory.
    fn vmlinux(entry: u64, address: u64, offset: u64, memory_size: u64) -> Vec<u8> {
        let mut file = vec![0; 0x1008];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54] = 56;
        file[56] = 1;
        file[64] = 1;
        file[72..80].copy_from_slice(&offset.to_le_bytes());
        file[88..96].copy_from_slice(&address.to_le_bytes());
        file[96..104].copy_from_slice(&8_u64.to_le_bytes());
        file[104..112].copy_from_slice(&memory_size.to_le_bytes());
        file[0x1000..].copy_from_slice(b"\xf4kernel!");
        file
    }

    /// Loads the kernel `content`. Returns it and the first 9 bytes at 1 MiB.
    fn try_load(content: &[u8]) -> Result<(LoadedKernel, [u8; 9]), KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        let memory = allocate(4 << 20, None).unwrap();
        let extent = Extent {
            offset: 0,
            length: content.len() as u64,
        };
        let loaded = load(&memory, &Image { file: &file, extent })?;
        let mut bytes = [0; 9];
        memory.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        Ok((loaded, bytes))
    }

    #[test]
    fn segment_is_loaded_at_its_physical_address() {
        let (loaded, bytes) = try_load(&vmlinux(0x10_0000, 0x10_0000, 0x1000, 0x2000)).unwrap();
        assert_eq!(
            loaded,
            LoadedKernel {
                entry: 0x10_0000,
                end: 0x10_2000,
                setup: None
            }
        );
        assert_eq!(&bytes, b"\xf4kernel!\0");
    }

    /// A crafted table of program headers made another loader run endlessly.
    #[test]
    fn number_and_place_of_program_headers_are_bounded_ghsa_52h2_m2cf_9jh6() {
        let with = |count: u16, size: u16, table: u64| {
            let mut file = vmlinux(0x10_0000, 0x10_0000, 0x1000, 8);
            file.resize(64 << 10, 0);
            file[32..40].copy_from_slice(&table.to_le_bytes());
            file[54..56].copy_from_slice(&size.to_le_bytes());
            file[56..58].copy_from_slice(&count.to_le_bytes());
            file
        };
        try_load(&with(MAX_PROGRAM_HEADERS, 56, 64)).expect("headers of type 0 are ignored");
        for (count, size, table) in [
            (MAX_PROGRAM_HEADERS + 1, 56, 64),
            (u16::MAX, 56, 64),
            (1, 0, 64),
            (1, 1, 64),
            (1, u16::MAX, 64),
            (0, 56, 64),
            (1, 56, (64 << 10) - 55),
            (1, 56, u64::MAX - 8),
            // The file header as program header.
            (MAX_PROGRAM_HEADERS, 56, 0),
        ] {
            assert!(
                try_load(&with(count, size, table)).is_err(),
                "{count} {size} {table:#x}"
            );
        }
    }

    #[test]
    fn invalid_kernels_are_refused() {
        let good = || vmlinux(0x10_0000, 0x10_0000, 0x1000, 8);
        let cases = [
            ("empty", vec![]),
            ("bzImage", vec![0x4d; 4096]),
            ("truncated in its program headers", good()[..80].to_vec()),
            ("entry outside", vmlinux(0x20_0000, 0x10_0000, 0x1000, 8)),
            ("segment beyond the file", vmlinux(0x10_0000, 0x10_0000, 0x1001, 8)),
            ("segment below 1 MiB", vmlinux(0x10_0000, 0x8000, 0x1000, 8)),
            ("segment beyond memory", vmlinux(0x10_0000, 0x10_0000, 0x1000, 1 << 40)),
            ("segment that wraps", vmlinux(0x10_0000, u64::MAX - 4, 0x1000, 8)),
            ("offset that wraps", vmlinux(0x10_0000, 0x10_0000, u64::MAX - 4, 8)),
            (
                "segment larger in the file than in memory",
                vmlinux(0x10_0000, 0x10_0000, 0x1000, 4),
            ),
        ];
        for (name, content) in cases {
            assert!(try_load(&content).is_err(), "{name}");
        }
    }
}
