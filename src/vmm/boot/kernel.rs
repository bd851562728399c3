//! Loads an uncompressed ELF `vmlinux`: its segments are brought to the physical addresses that
//! they name, and it is entered at its 64-bit entry point.
//!
//! The file is the host owner's, but a bad one must end in an error: every field is checked.

use std::{fs::File, io, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress};

use super::HIGH_MEMORY;
use crate::{
    control::Extent,
    memory::{ExpectedAccess, MemoryError, MemoryRegions, load_file},
};

/// The length of an ELF file header, in bytes.
const FILE_HEADER: usize = 64;
/// The length of a program header, in bytes.
const PROGRAM_HEADER: usize = 56;
/// The most program headers; a kernel has about five.
const MAX_SEGMENTS: u16 = 64;
const LOAD: u32 = 1;
/// The flag of a segment that the kernel writes (`PF_W`).
const WRITABLE: u32 = 2;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// Not what we load.
    #[error("the guest's kernel is not an uncompressed x86-64 ELF vmlinux: {0}")]
    Format(&'static str),
    /// A segment does not fit into memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The file cannot be read.
    #[error("reading the guest's kernel: {0}")]
    Read(#[source] io::Error),
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// The address of its first instruction.
    pub(crate) entry: u64,
    /// The first address behind it.
    pub(crate) end: u64,
}

/// Loads the kernel that lies at `extent` of `file`.
pub(crate) fn load(memory: &MemoryRegions, file: &File, extent: Extent) -> Result<Loaded, KernelError> {
    let mut header = [0; FILE_HEADER];
    read(file, extent, 0, &mut header)?;
    if header[..6] != *b"\x7fELF\x02\x01" || half(&header, 18) != 62 {
        return Err(KernelError::Format("no ELF header of a 64-bit x86 program"));
    }
    let (entry, table, size, count) = (
        long(&header, 24),
        long(&header, 32),
        half(&header, 54),
        half(&header, 56),
    );
    if usize::from(size) != PROGRAM_HEADER || count > MAX_SEGMENTS {
        return Err(KernelError::Format("its program headers are not of this format"));
    }
    let mut headers = vec![0; PROGRAM_HEADER * usize::from(count)];
    read(file, extent, table, &mut headers)?;
    let mut end = 0;
    for segment in headers
        .chunks_exact(PROGRAM_HEADER)
        .filter(|segment| word(segment, 0) == LOAD)
    {
        end = end.max(load_segment(memory, file, extent, segment)?);
    }
    if !(HIGH_MEMORY..end).contains(&entry) {
        return Err(KernelError::Format("its entry point lies outside of its segments"));
    }
    Ok(Loaded { entry, end })
}

/// Loads one segment; returns the address behind it.
fn load_segment(memory: &MemoryRegions, file: &File, extent: Extent, segment: &[u8]) -> Result<u64, KernelError> {
    let (offset, address) = (long(segment, 8), long(segment, 24));
    let (in_file, in_memory) = (long(segment, 32), long(segment, 40));
    let inside = offset.checked_add(in_file).is_some_and(|end| end <= extent.length) && in_file <= in_memory;
    let end = address.checked_add(in_memory).filter(|_| address >= HIGH_MEMORY);
    let (true, Some(end)) = (inside, end) else {
        return Err(KernelError::Format("a segment lies outside of the file or of memory"));
    };
    let part = Extent {
        offset: extent.offset + offset,
        length: in_file,
    };
    let access = if word(segment, 4) & WRITABLE == 0 {
        ExpectedAccess::ReadMostly
    } else {
        ExpectedAccess::WriteMostly
    };
    load_file(memory, "kernel", file, part, address, access)?;
    // What follows in the segment's memory must read as zero, and fresh memory does; it must exist.
    if end > address && memory.read_obj::<u8>(GuestAddress(end - 1)).is_err() {
        return Err(KernelError::Memory(MemoryError::Load {
            what: "kernel",
            address,
            source: io::ErrorKind::OutOfMemory.into(),
        }));
    }
    Ok(end)
}

fn read(file: &File, extent: Extent, offset: u64, target: &mut [u8]) -> Result<(), KernelError> {
    let inside = offset
        .checked_add(target.len() as u64)
        .is_some_and(|end| end <= extent.length);
    if !inside {
        return Err(KernelError::Format("it is cut short"));
    }
    file.read_exact_at(target, extent.offset + offset)
        .map_err(KernelError::Read)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) | u32::from(half(bytes, at + 2)) << 16
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::allocate;

    /// An ELF file with one segment of 8 bytes in the file and `in_memory` in memory.
    fn vmlinux(entry: u64, address: u64, offset: u64, in_memory: u64) -> Vec<u8> {
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
        file[104..112].copy_from_slice(&in_memory.to_le_bytes());
        file[0x1000..].copy_from_slice(b"\xf4kernel!");
        file
    }

    fn try_load(content: &[u8]) -> Result<(Loaded, [u8; 9]), KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        let memory = allocate(4 << 20, false).unwrap();
        let extent = Extent {
            offset: 0,
            length: content.len() as u64,
        };
        let loaded = load(&memory, &file, extent)?;
        let mut bytes = [0; 9];
        memory.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        Ok((loaded, bytes))
    }

    #[test]
    fn segment_lands_at_its_physical_address() {
        let (loaded, bytes) = try_load(&vmlinux(0x10_0000, 0x10_0000, 0x1000, 0x2000)).unwrap();
        assert_eq!(
            loaded,
            Loaded {
                entry: 0x10_0000,
                end: 0x10_2000
            }
        );
        assert_eq!(&bytes, b"\xf4kernel!\0");
    }

    #[test]
    fn broken_kernels_are_refused() {
        let good = || vmlinux(0x10_0000, 0x10_0000, 0x1000, 8);
        let cases = [
            ("empty", vec![]),
            ("bzImage", vec![0x4d; 4096]),
            ("cut in its program headers", good()[..80].to_vec()),
            ("entry outside", vmlinux(0x20_0000, 0x10_0000, 0x1000, 8)),
            ("segment beyond the file", vmlinux(0x10_0000, 0x10_0000, 0x1001, 8)),
            ("segment below 1 MiB", vmlinux(0x10_0000, 0x8000, 0x1000, 8)),
            ("segment beyond memory", vmlinux(0x10_0000, 0x10_0000, 0x1000, 1 << 40)),
            ("segment that wraps", vmlinux(0x10_0000, u64::MAX - 4, 0x1000, 8)),
            ("offset that wraps", vmlinux(0x10_0000, 0x10_0000, u64::MAX - 4, 8)),
            (
                "more in the file than in memory",
                vmlinux(0x10_0000, 0x10_0000, 0x1000, 4),
            ),
        ];
        for (name, content) in cases {
            assert!(try_load(&content).is_err(), "{name}");
        }
    }
}
