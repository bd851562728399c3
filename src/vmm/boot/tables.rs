//! The structures of the 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): page tables, GDT, command
//! line, random seed, and the zero page with the memory map.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    COMMAND_LINE, GDT, GDT_ENTRIES, HIGH_MEMORY_START, LOW_MEMORY_END, PAGE_TABLES, RNG_SEED, ZERO_PAGE,
};
use crate::memory::{HUGE_PAGE_SIZE, MemoryRegions, ram_ranges};

/// `COMMAND_LINE_SIZE` of Linux in bytes, including the terminating NUL.
const COMMAND_LINE_SIZE: usize = 2048;

const E820_RAM: u32 = 1;
const SETUP_RNG_SEED: u32 = 9;
/// The size of the seed in bytes.
const SEED_SIZE: usize = 32;
/// The type of a boot loader without an assigned ID.
const UNDEFINED_LOADER: u8 = 0xff;

/// Why the boot structures cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error(
        "the kernel's command line has {0} bytes, but Linux supports at most {max}: shorten the configured arguments",
        max = COMMAND_LINE_SIZE - 1
    )]
    CommandLine(usize),
    #[error("the initramfs does not fit into guest memory: give the machine more memory")]
    Initramfs,
    #[error("guest memory is too small to boot: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("cannot get a random seed for the guest: {0}")]
    Seed(#[source] std::io::Error),
}

/// The position of the initramfs in guest memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::vmm) struct LoadedInitramfs {
    pub(in crate::vmm) address: u64,
    /// In bytes.
    pub(in crate::vmm) length: u64,
}

/// The address for an initramfs of `length` bytes: page-aligned, at the end of the memory below 4 GiB, far from the
/// kernel, which grows upwards. `None` if it does not fit there.
pub(in crate::vmm) fn initramfs_address(memory_bytes: u64, length: u64) -> Option<u64> {
    let (base, low) = ram_ranges(memory_bytes)[0];
    Some((base + low).checked_sub(length)? & !0xfff)
}

/// Writes all boot structures except the MP table.
pub(in crate::vmm) fn write(
    memory: &MemoryRegions,
    memory_bytes: u64,
    command_line: &str,
    initramfs: LoadedInitramfs,
) -> Result<(), BootError> {
    memory.write_slice(to_le_bytes(&GDT_ENTRIES).as_slice(), GuestAddress(GDT))?;
    write_page_tables(memory)?;
    if command_line.len() >= COMMAND_LINE_SIZE {
        return Err(BootError::CommandLine(command_line.len()));
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0_u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;
    write_seed(memory)?;
    let params = Params(zero_page(memory_bytes, command_line.len(), initramfs));
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(())
}

/// Identity-maps the first GiB with 2 MiB pages. The kernel reads nothing above it before it sets up its page tables.
fn write_page_tables(memory: &MemoryRegions) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE_PAGE: u64 = 1 << 7;
    let (pointers, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers))?;
    let mut entries = [0_u64; 512];
    for (entry, page) in entries.iter_mut().zip(0..) {
        *entry = (page * HUGE_PAGE_SIZE) | PRESENT_WRITABLE | HUGE_PAGE;
    }
    memory.write_slice(&to_le_bytes(&entries), GuestAddress(directory))
}

/// Writes a random seed. With it, the guest's random number generator is ready at once, before any driver is loaded.
fn write_seed(memory: &MemoryRegions) -> Result<(), BootError> {
    let mut seed = [0; SEED_SIZE];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| BootError::Seed(error.into()))?;
    // struct setup_data: next, type, length, data.
    let mut data = [0; 16 + SEED_SIZE];
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data[12..16].copy_from_slice(&u32::try_from(SEED_SIZE).unwrap_or(0).to_le_bytes());
    data[16..].copy_from_slice(&seed);
    Ok(memory.write_slice(&data, GuestAddress(RNG_SEED))?)
}

fn zero_page(memory_bytes: u64, command_line_length: usize, initramfs: LoadedInitramfs) -> boot_params {
    let low_u32 = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut params = boot_params {
        hdr: setup_header {
            type_of_loader: UNDEFINED_LOADER,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            cmd_line_ptr: low_u32(COMMAND_LINE),
            cmdline_size: low_u32(command_line_length as u64),
            ramdisk_image: low_u32(initramfs.address),
            ramdisk_size: low_u32(initramfs.length),
            kernel_alignment: 0x0100_0000,
            setup_data: RNG_SEED,
            ..setup_header::default()
        },
        ..boot_params::default()
    };
    let mut map = vec![(0, LOW_MEMORY_END)];
    for (base, length) in ram_ranges(memory_bytes) {
        let start = base.max(HIGH_MEMORY_START);
        map.push((start, base + length - start));
    }
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: E820_RAM,
        };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    params
}

fn to_le_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A [`boot_params`] that can be written to guest memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Params(boot_params);

// SAFETY: `boot_params` is the kernel's packed C structure of integers and arrays. It has no padding, and every bit
// pattern is valid.
unsafe impl ByteValued for Params {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn memory_map_has_all_memory_except_the_legacy_hole_and_the_device_window() {
        let gib = 1 << 30;
        let initramfs = LoadedInitramfs { address: 0, length: 0 };
        let params = zero_page(5 * gib, 0, initramfs);
        let count = usize::from(params.e820_entries);
        let table = params.e820_table;
        let map: Vec<_> = table[..count].iter().map(|entry| (entry.addr, entry.size)).collect();
        assert_eq!(
            map,
            [
                (0, LOW_MEMORY_END),
                (HIGH_MEMORY_START, 3 * gib - HIGH_MEMORY_START),
                (4 * gib, 2 * gib)
            ]
        );
    }

    #[test]
    fn command_line_that_linux_would_truncate_is_refused() {
        let memory = allocate(4 << 20, false).unwrap();
        let initramfs = LoadedInitramfs { address: 0, length: 0 };
        let line = "x".repeat(COMMAND_LINE_SIZE);
        assert!(matches!(
            write(&memory, 4 << 20, &line, initramfs),
            Err(BootError::CommandLine(2048))
        ));
        write(&memory, 4 << 20, &line[1..], initramfs).unwrap();
    }

    #[test]
    fn two_machines_get_different_seeds() {
        let seeds = [(); 2].map(|()| {
            let memory = allocate(2 << 20, false).unwrap();
            write_seed(&memory).unwrap();
            let mut seed = [0; SEED_SIZE];
            memory.read_slice(&mut seed, GuestAddress(RNG_SEED + 16)).unwrap();
            seed
        });
        assert_ne!(seeds[0], seeds[1]);
    }
}
