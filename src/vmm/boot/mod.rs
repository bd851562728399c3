//! What the guest finds in memory when its first instruction runs: the kernel ([`kernel`]), the
//! tables that say which processors and interrupt lines there are ([`mptable`]), and what the
//! 64-bit boot protocol of Linux asks for (Documentation/arch/x86/boot.rst): page tables, a
//! descriptor table, the command line and the zero page with the memory map.

pub(crate) mod kernel;
pub(crate) mod mptable;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{HUGE_PAGE_SIZE, MemoryRegions, ram_ranges};

/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// The zero page (`boot_params`).
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// The top of the page tables, which take three pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// Seed of the guest's random number generator (`SETUP_RNG_SEED`).
const RNG_SEED: u64 = 0xd000;
/// The command line.
const COMMAND_LINE: u64 = 0x2_0000;
/// The most bytes that Linux takes of it (`COMMAND_LINE_SIZE`).
const MAX_COMMAND_LINE: usize = 2048;
/// Where memory for programs ends below 640 KiB; the tables of [`mptable`] stand behind.
pub(crate) const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Where memory starts again.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const SETUP_RNG_SEED: u32 = 9;
const SEED_LENGTH: usize = 32;
/// The loader's id where it has none assigned.
const UNDEFINED_LOADER: u8 = 0xff;

/// The flat descriptors that 64-bit boot asks for: null, code, data, and a task segment that
/// virtualization wants to find.
pub(crate) const DESCRIPTORS: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Why a machine cannot be made to boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The command line is too long.
    #[error("the kernel's command line has {0} bytes, more than the {MAX_COMMAND_LINE} that Linux takes")]
    CommandLine(usize),
    /// Not enough memory to boot in.
    #[error("guest memory is too small to boot in: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The host has no random numbers.
    #[error("no random seed for the guest: {0}")]
    Seed(#[source] std::io::Error),
}

/// Where the initramfs lies in guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Initramfs {
    /// Guest physical address.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) length: u64,
}

/// The address for an initramfs of `length` bytes: at the end of low memory, page-aligned, far
/// from the kernel, which grows upwards.
pub(crate) fn initramfs_address(memory_bytes: u64, length: u64) -> Option<u64> {
    let (base, low) = ram_ranges(memory_bytes)[0];
    Some((base + low).checked_sub(length)? & !0xfff)
}

/// Writes everything but the kernel, the initramfs and the MP table.
pub(crate) fn write_tables(
    memory: &MemoryRegions,
    memory_bytes: u64,
    command_line: &str,
    initramfs: Initramfs,
) -> Result<(), BootError> {
    memory.write_slice(bytes_of(&DESCRIPTORS).as_slice(), GuestAddress(GDT))?;
    write_page_tables(memory)?;
    if command_line.len() >= MAX_COMMAND_LINE {
        return Err(BootError::CommandLine(command_line.len()));
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0_u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;
    write_seed(memory)?;
    let params = Params(zero_page(memory_bytes, command_line.len(), initramfs));
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(())
}

/// Identity-maps the first GiB with 2 MiB pages, which covers all that the kernel reads before it
/// makes tables of its own.
fn write_page_tables(memory: &MemoryRegions) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let (pointers, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers))?;
    let mut entries = [0_u64; 512];
    for (entry, page) in entries.iter_mut().zip(0..) {
        *entry = (page * HUGE_PAGE_SIZE) | PRESENT_WRITABLE | HUGE;
    }
    memory.write_slice(&bytes_of(&entries), GuestAddress(directory))
}

/// Gives the guest's generator its entropy before the first user asks, without a driver.
fn write_seed(memory: &MemoryRegions) -> Result<(), BootError> {
    let mut seed = [0; SEED_LENGTH];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| BootError::Seed(error.into()))?;
    // struct setup_data: next, type, length, data.
    let mut data = [0; 16 + SEED_LENGTH];
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data[12..16].copy_from_slice(&u32::try_from(SEED_LENGTH).unwrap_or(0).to_le_bytes());
    data[16..].copy_from_slice(&seed);
    Ok(memory.write_slice(&data, GuestAddress(RNG_SEED))?)
}

fn zero_page(memory_bytes: u64, command_line_length: usize, initramfs: Initramfs) -> boot_params {
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut params = boot_params {
        hdr: setup_header {
            type_of_loader: UNDEFINED_LOADER,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            cmd_line_ptr: word(COMMAND_LINE),
            cmdline_size: word(command_line_length as u64),
            ramdisk_image: word(initramfs.address),
            ramdisk_size: word(initramfs.length),
            kernel_alignment: 0x0100_0000,
            setup_data: RNG_SEED,
            ..setup_header::default()
        },
        ..boot_params::default()
    };
    let mut map = vec![(0, LOW_MEMORY_END)];
    for (base, length) in ram_ranges(memory_bytes) {
        let start = base.max(HIGH_MEMORY);
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

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Params(boot_params);

// SAFETY: `boot_params` is the kernel's packed C structure of plain integers and arrays: every bit
// pattern is valid and it has no padding.
unsafe impl ByteValued for Params {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn memory_map_names_all_memory_but_the_legacy_hole_and_the_device_window() {
        let gib = 1 << 30;
        let initramfs = Initramfs { address: 0, length: 0 };
        let params = zero_page(5 * gib, 0, initramfs);
        let count = usize::from(params.e820_entries);
        let table = params.e820_table;
        let map: Vec<_> = table[..count].iter().map(|entry| (entry.addr, entry.size)).collect();
        assert_eq!(
            map,
            [
                (0, LOW_MEMORY_END),
                (HIGH_MEMORY, 3 * gib - HIGH_MEMORY),
                (4 * gib, 2 * gib)
            ]
        );
    }

    #[test]
    fn command_line_that_linux_would_cut_is_refused() {
        let memory = allocate(4 << 20, false).unwrap();
        let initramfs = Initramfs { address: 0, length: 0 };
        let line = "x".repeat(MAX_COMMAND_LINE);
        assert!(matches!(
            write_tables(&memory, 4 << 20, &line, initramfs),
            Err(BootError::CommandLine(2048))
        ));
        write_tables(&memory, 4 << 20, &line[1..], initramfs).unwrap();
    }

    #[test]
    fn two_machines_get_different_seeds() {
        let seeds = [(); 2].map(|()| {
            let memory = allocate(2 << 20, false).unwrap();
            write_seed(&memory).unwrap();
            let mut seed = [0; SEED_LENGTH];
            memory.read_slice(&mut seed, GuestAddress(RNG_SEED + 16)).unwrap();
            seed
        });
        assert_ne!(seeds[0], seeds[1]);
    }
}
