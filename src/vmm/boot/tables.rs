//! The structures of the 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): page tables, GDT, command
//! line, random seed, and the zero page with the memory map.

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::{
    kernel::LoadedKernel,
    layout::{
        COMMAND_LINE, COMMAND_LINE_END, GDT, GDT_ENTRIES, HIGH_MEMORY_START, IDENTITY_MAP_END, LOW_MEMORY_END,
        PAGE_TABLES, RNG_SEED, ZERO_PAGE,
    },
};
use crate::memory::{HUGE_PAGE_SIZE, MemoryRegions, ram_ranges};

/// The maximum length of the command line in bytes, without the terminating NUL, of a kernel that states none:
/// `COMMAND_LINE_SIZE` of Linux - 1.
const MAX_COMMAND_LINE: usize = 2047;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const SETUP_RNG_SEED: u32 = 9;
/// The size of the seed in bytes.
const SEED_SIZE: usize = 32;
/// The type of a boot loader without an assigned ID.
const UNDEFINED_LOADER: u8 = 0xff;

/// Why the boot structures cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error(
        "the kernel's command line has {length} bytes, but the kernel supports at most {max}: shorten the configured \
         arguments"
    )]
    CommandLine { length: usize, max: usize },
    #[error("the initramfs does not fit into guest memory: give the machine more memory")]
    Initramfs,
    #[error("guest memory is too small to boot: {0}: give the machine more memory")]
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

/// The values from which [`write`] builds the boot structures.
#[derive(Debug, Clone, Copy)]
pub(in crate::vmm) struct BootInformation<'i> {
    /// The size of boot memory in bytes.
    pub(in crate::vmm) memory: u64,
    /// Ranges that the kernel must not use, whether or not they are memory. They do not overlap each other.
    pub(in crate::vmm) reserved: &'i [Range<u64>],
    pub(in crate::vmm) kernel: &'i LoadedKernel,
    pub(in crate::vmm) command_line: &'i str,
    pub(in crate::vmm) initramfs: Option<LoadedInitramfs>,
    /// The address of ACPI's root pointer, if the board has ACPI.
    pub(in crate::vmm) rsdp: Option<u64>,
}

/// The address for an initramfs of `length` bytes: page-aligned, at the end of the memory below 4 GiB that `kernel` can
/// use for it, far from the kernel, which grows upwards. `None` if it does not fit there.
pub(in crate::vmm) fn initramfs_address(memory_bytes: u64, length: u64, kernel: &LoadedKernel) -> Option<u64> {
    let (base, low) = ram_ranges(memory_bytes)[0];
    let end = match kernel.max_initramfs_address() {
        Some(max) => (base + low).min(max.saturating_add(1)),
        None => base + low,
    };
    let address = end.checked_sub(length)? & !0xfff;
    (address >= kernel.end).then_some(address)
}

/// Writes all boot structures except the tables that describe the board.
pub(in crate::vmm) fn write(memory: &MemoryRegions, information: &BootInformation<'_>) -> Result<(), BootError> {
    memory.write_slice(to_le_bytes(&GDT_ENTRIES).as_slice(), GuestAddress(GDT))?;
    write_page_tables(memory)?;
    write_command_line(memory, information)?;
    write_seed(memory)?;
    let params = Params(zero_page(information));
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(())
}

fn write_command_line(memory: &MemoryRegions, information: &BootInformation<'_>) -> Result<(), BootError> {
    let line = information.command_line;
    let capacity = usize::try_from(COMMAND_LINE_END - COMMAND_LINE - 1).unwrap_or(0);
    let max = information.kernel.max_command_line();
    let max = max.map_or(MAX_COMMAND_LINE, |max| max.min(capacity));
    if line.len() > max {
        let length = line.len();
        return Err(BootError::CommandLine { length, max });
    }
    memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    Ok(memory.write_obj(0_u8, GuestAddress(COMMAND_LINE + line.len() as u64))?)
}

/// Identity-maps the first GiB with 2 MiB pages. The kernel reads nothing above it before it sets up its page tables.
fn write_page_tables(memory: &MemoryRegions) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE_PAGE: u64 = 1 << 7;
    let (pointers, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers))?;
    const { assert!(IDENTITY_MAP_END == 512 * HUGE_PAGE_SIZE) };
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

fn zero_page(information: &BootInformation<'_>) -> boot_params {
    let low_u32 = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let initramfs = information
        .initramfs
        .unwrap_or(LoadedInitramfs { address: 0, length: 0 });
    let setup = information.kernel.setup.unwrap_or(setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        cmdline_size: low_u32(information.command_line.len() as u64),
        kernel_alignment: 0x0100_0000,
        ..setup_header::default()
    });
    let mut params = boot_params {
        hdr: setup_header {
            type_of_loader: UNDEFINED_LOADER,
            ext_loader_type: 0,
            ext_loader_ver: 0,
            cmd_line_ptr: low_u32(COMMAND_LINE),
            ramdisk_image: low_u32(initramfs.address),
            ramdisk_size: low_u32(initramfs.length),
            setup_data: RNG_SEED,
            ..setup
        },
        acpi_rsdp_addr: information.rsdp.unwrap_or(0),
        ..boot_params::default()
    };
    let map = memory_map(information.memory, information.reserved);
    for (entry, source) in params.e820_table.iter_mut().zip(&map) {
        *entry = *source;
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    params
}

/// The memory map, in ascending order. Memory between the end of low memory and 1 MiB is in no entry, unless it is
/// reserved.
fn memory_map(memory_bytes: u64, reserved: &[Range<u64>]) -> Vec<boot_e820_entry> {
    let entry = |addr, size, r#type| boot_e820_entry { addr, size, r#type };
    let mut map = vec![entry(0, LOW_MEMORY_END, E820_RAM)];
    map.extend(ram_ranges(memory_bytes).into_iter().map(|(base, length)| {
        let start = base.max(HIGH_MEMORY_START);
        entry(start, base + length - start, E820_RAM)
    }));
    map.extend(
        reserved
            .iter()
            .map(|range| entry(range.start, range.end - range.start, E820_RESERVED)),
    );
    map.sort_by_key(|entry| entry.addr);
    map
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
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::{memory::allocate, vmm::boot::pc_layout};

    const MIB: u64 = 1 << 20;

    const VMLINUX: LoadedKernel = LoadedKernel {
        entry: 0x100_0000,
        end: 0x200_0000,
        setup: None,
    };

    fn bzimage(change: impl FnOnce(&mut setup_header)) -> LoadedKernel {
        let mut setup = setup_header {
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            ..setup_header::default()
        };
        change(&mut setup);
        LoadedKernel {
            setup: Some(setup),
            ..VMLINUX
        }
    }

    fn information<'i>(kernel: &'i LoadedKernel, command_line: &'i str) -> BootInformation<'i> {
        BootInformation {
            memory: 32 * MIB,
            reserved: &[],
            kernel,
            command_line,
            initramfs: None,
            rsdp: None,
        }
    }

    fn map(memory_bytes: u64, reserved: &[Range<u64>]) -> Vec<(u64, u64, u32)> {
        let map = memory_map(memory_bytes, reserved);
        map.iter().map(|entry| (entry.addr, entry.size, entry.r#type)).collect()
    }

    #[test]
    fn memory_map_has_all_memory_except_the_legacy_hole_and_the_device_window() {
        let gib = 1 << 30;
        assert_eq!(
            map(5 * gib, &[]),
            [
                (0, LOW_MEMORY_END, 1),
                (HIGH_MEMORY_START, 3 * gib - HIGH_MEMORY_START, 1),
                (4 * gib, 2 * gib, 1)
            ]
        );
    }

    #[test]
    fn memory_map_of_the_pc_board_reserves_firmware_tables_and_pci_configuration_space() {
        let gib = 1 << 30;
        assert_eq!(
            map(5 * gib, &pc_layout::RESERVED),
            [
                (0, LOW_MEMORY_END, 1),
                (0xe_0000, 0x2_0000, 2),
                (HIGH_MEMORY_START, 3 * gib - HIGH_MEMORY_START, 1),
                (0xe000_0000, 0x10_0000, 2),
                (4 * gib, 2 * gib, 1)
            ]
        );
    }

    /// The boot structures of a container's machine have been the same since the first release, except the seed. A
    /// kernel could depend on any byte.
    #[test]
    fn boot_structures_of_the_container_board_do_not_change() {
        let memory = allocate(512 * MIB, None).unwrap();
        let information = BootInformation {
            memory: 512 * MIB,
            initramfs: Some(LoadedInitramfs {
                address: 0x1fe0_0000,
                length: 0x12_3456,
            }),
            ..information(&VMLINUX, "quiet console=hvc0")
        };
        write(&memory, &information).unwrap();

        memory
            .write_slice(&[0; SEED_SIZE], GuestAddress(RNG_SEED + 16))
            .unwrap();
        let mut low = vec![0; 0x10_0000];
        memory.read_slice(&mut low, GuestAddress(0)).unwrap();
        assert_eq!(
            format!("{:x}", Sha256::digest(&low)),
            "653068aea17e9f471e4b2461870baada7fd386063240e43aa220aefb3a44a552"
        );
    }

    #[test]
    fn zero_page_has_the_setup_header_of_a_bzimage_with_the_loaders_fields() {
        let kernel = bzimage(|setup| {
            setup.setup_data = 0xdead_beef;
            setup.ramdisk_image = 1;
            setup.cmd_line_ptr = 2;
            setup.ext_loader_type = 3;
        });
        let page = zero_page(&BootInformation {
            initramfs: Some(LoadedInitramfs {
                address: 0x180_0000,
                length: 77,
            }),
            rsdp: Some(pc_layout::RSDP),
            ..information(&kernel, "console=ttyS0")
        });

        assert_eq!(
            { page.hdr },
            setup_header {
                type_of_loader: 0xff,
                ext_loader_type: 0,
                setup_data: RNG_SEED,
                cmd_line_ptr: 0x2_0000,
                ramdisk_image: 0x180_0000,
                ramdisk_size: 77,
                ..kernel.setup.unwrap()
            }
        );
        assert_eq!({ page.acpi_rsdp_addr }, 0xe_0000);
        let page = Params(page);
        assert_eq!(page.as_slice()[0x1ef], 0, "sentinel");
        assert_eq!(page.as_slice()[0x202..0x206], *b"HdrS");
    }

    #[test]
    fn kernel_can_boot_without_an_initramfs() {
        let kernel = bzimage(|setup| {
            setup.ramdisk_image = 1;
            setup.ramdisk_size = 1;
        });
        let page = zero_page(&information(&kernel, ""));
        assert_eq!(({ page.hdr.ramdisk_image }, { page.hdr.ramdisk_size }), (0, 0));
    }

    #[test]
    fn initramfs_lies_behind_the_kernel_and_below_the_limit_of_its_header() {
        let limited = |max| bzimage(|setup| setup.initrd_addr_max = max);
        let cases = [
            (VMLINUX, 256 * MIB, MIB + 1, Some(255 * MIB - 0x1000)),
            (VMLINUX, 8192 * MIB, MIB, Some(3071 * MIB)),
            (limited(0x7fff_ffff), 8192 * MIB, MIB, Some(2047 * MIB)),
            (limited(0x7fff_ffff), 256 * MIB, MIB, Some(255 * MIB)),
            (limited(u32::MAX), 8192 * MIB, MIB, Some(3071 * MIB)),
            (limited(0x7fff_ffff), 256 * MIB, 224 * MIB, Some(32 * MIB)),
            (limited(0x7fff_ffff), 256 * MIB, 224 * MIB + 1, None),
            (limited(0), 256 * MIB, 1, None),
            (limited(0), 256 * MIB, MIB, None),
            (limited(u32::MAX), 256 * MIB, u64::MAX, None),
        ];
        for (kernel, memory_bytes, length, expected) in cases {
            let address = initramfs_address(memory_bytes, length, &kernel);
            assert_eq!(address, expected, "{kernel:?}, {memory_bytes}, {length}");
        }
    }

    #[test]
    fn command_line_that_the_kernel_would_truncate_is_refused() {
        let memory = allocate(32 * MIB, None).unwrap();
        let limited = |max| bzimage(|setup| setup.cmdline_size = max);
        let area = usize::try_from(COMMAND_LINE_END - COMMAND_LINE).unwrap();
        for (kernel, max) in [
            (VMLINUX, 2047),
            (limited(255), 255),
            (limited(4096), 4096),
            (limited(0), 0),
            (limited(u32::MAX), area - 1),
        ] {
            let line = "x".repeat(max + 1);
            let refused = write(&memory, &information(&kernel, &line)).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("{} bytes, but the kernel supports at most {max}", max + 1)),
                "{refused}"
            );

            write(&memory, &information(&kernel, &line[1..])).unwrap();
            let end = GuestAddress(COMMAND_LINE + max as u64);
            assert_eq!(memory.read_obj::<u8>(end).unwrap(), 0);
        }
    }

    #[test]
    fn two_machines_get_different_seeds() {
        let seeds = [(); 2].map(|()| {
            let memory = allocate(2 << 20, None).unwrap();
            write_seed(&memory).unwrap();
            let mut seed = [0; SEED_SIZE];
            memory.read_slice(&mut seed, GuestAddress(RNG_SEED + 16)).unwrap();
            seed
        });
        assert_ne!(seeds[0], seeds[1]);
    }
}
