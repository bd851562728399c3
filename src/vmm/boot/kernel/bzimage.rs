//! Loads a `bzImage` by Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): the compressed kernel goes to
//! the address that its setup header prefers, and starts in 64-bit mode. The boot sector and the 16-bit setup code,
//! which precede it in the file, are not loaded.

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::image::{Image, KernelError, LoadedKernel};
use crate::{
    memory::{ExpectedAccess, MemoryRegions, load_file},
    vmm::boot::layout::{HIGH_MEMORY_START, IDENTITY_MAP_END},
};

/// The offset of the setup header in the file.
const SETUP_HEADER: u64 = 0x1f1;
/// The offset of the magic number `HdrS`. The displacement of the jump instruction before it, which leads to the
/// header's end, counts from here.
const MAGIC_OFFSET: u64 = 0x202;
const MAGIC: [u8; 4] = *b"HdrS";
/// The end of `init_size`, the last field that is needed.
const MIN_HEADER_END: u64 = 0x264;
const SECTOR_SIZE: u64 = 512;
/// The number of sectors of setup code if the header has 0.
const DEFAULT_SETUP_SECTORS: u8 = 4;
const BOOT_SECTOR_MAGIC: u16 = 0xaa55;
/// The first protocol version with `xloadflags`, 2.12.
const MIN_VERSION: u16 = 0x020c;
/// `LOADED_HIGH` of `loadflags`: the kernel is loaded above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// The unit of `syssize` in bytes.
const PARAGRAPH: u64 = 16;
/// The distance of the 64-bit entry point from the start of the loaded kernel.
const ENTRY_OFFSET: u64 = 0x200;

pub(super) fn is_bzimage(image: &Image<'_>) -> Result<bool, KernelError> {
    let mut magic = [0; MAGIC.len()];
    Ok(image.read(MAGIC_OFFSET, &mut magic)? && magic == MAGIC)
}

pub(super) fn load(memory: &MemoryRegions, image: &Image<'_>) -> Result<LoadedKernel, KernelError> {
    let setup = read_header(image)?;
    check_header(&setup)?;

    let sectors = match setup.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        count => count,
    };
    let offset = (u64::from(sectors) + 1) * SECTOR_SIZE;
    let part = image
        .part(offset, u64::from(setup.syssize) * PARAGRAPH)
        .ok_or(KernelError::BzImage("it is truncated"))?;
    if part.length <= ENTRY_OFFSET {
        return Err(KernelError::BzImage("it ends before its entry point"));
    }

    let start = load_address(&setup)?;
    let bytes = part.length.max(setup.init_size.into());
    let end = usable_end(memory);
    let kernel_end = start
        .checked_add(bytes)
        .filter(|kernel_end| *kernel_end <= end)
        .ok_or(KernelError::TooLarge {
            address: start,
            bytes,
            end,
        })?;
    // Copied, not mapped: the kernel overwrites most of itself when it decompresses.
    load_file(memory, "kernel", image.file, part, start, ExpectedAccess::WriteMostly)?;
    Ok(LoadedKernel {
        entry: start + ENTRY_OFFSET,
        end: kernel_end,
        setup: Some(setup),
    })
}

/// Reads the setup header, which ends where its jump instruction leads. Later fields are 0.
fn read_header(image: &Image<'_>) -> Result<setup_header, KernelError> {
    let mut setup = Setup(setup_header::default());
    let bytes = setup.as_mut_slice();
    let mut jump = [0; 2];
    if !image.read(MAGIC_OFFSET - 2, &mut jump)? {
        return Err(KernelError::BzImage("it is truncated"));
    }
    let end = MAGIC_OFFSET + u64::from(jump[1]);
    if end < MIN_HEADER_END {
        return Err(KernelError::BzImage("its setup header is too short"));
    }
    let length = usize::try_from(end - SETUP_HEADER).unwrap_or(usize::MAX);
    let length = length.min(bytes.len());
    if !image.read(SETUP_HEADER, &mut bytes[..length])? {
        return Err(KernelError::BzImage("it is truncated"));
    }
    Ok(setup.0)
}

fn check_header(setup: &setup_header) -> Result<(), KernelError> {
    let fault = if setup.boot_flag != BOOT_SECTOR_MAGIC {
        "it has no boot sector magic"
    } else if setup.version < MIN_VERSION {
        "its boot protocol is older than 2.12"
    } else if setup.loadflags & LOADED_HIGH == 0 {
        "it must be loaded below 1 MiB (zImage)"
    } else if setup.xloadflags & XLF_KERNEL_64 == 0 {
        "it has no 64-bit entry point (XLF_KERNEL_64)"
    } else if setup.init_size == 0 {
        "it does not state how much memory it needs (init_size)"
    } else {
        return Ok(());
    };
    Err(KernelError::BzImage(fault))
}

/// The address to load the kernel at: the preferred one, which for a relocatable kernel is aligned and at least 1 MiB.
/// A lower address would not save memory, because the kernel would move itself up to the preferred one.
fn load_address(setup: &setup_header) -> Result<u64, KernelError> {
    let preferred = setup.pref_address;
    if setup.relocatable_kernel == 0 {
        return if preferred >= HIGH_MEMORY_START {
            Ok(preferred)
        } else {
            Err(KernelError::BzImage("it runs only at an address below 1 MiB"))
        };
    }
    let alignment = u64::from(setup.kernel_alignment);
    if !alignment.is_power_of_two() {
        return Err(KernelError::BzImage("its alignment is not a power of two"));
    }
    preferred
        .max(HIGH_MEMORY_START)
        .checked_next_multiple_of(alignment)
        .ok_or(KernelError::BzImage("its load address is too high"))
}

/// The end of the memory that the kernel can use before it sets up its page tables.
fn usable_end(memory: &MemoryRegions) -> u64 {
    memory
        .find_region(GuestAddress(HIGH_MEMORY_START))
        .map_or(HIGH_MEMORY_START, |region| region.start_addr().0 + region.len())
        .min(IDENTITY_MAP_END)
}

/// A [`setup_header`] that can be read from bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Setup(setup_header);

// SAFETY: `setup_header` is the kernel's packed C structure of integers. It has no padding, and every bit pattern is
// valid.
unsafe impl ByteValued for Setup {}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;
    use crate::{control::Extent, memory::allocate, vmm::boot::kernel};

    const MIB: u64 = 1 << 20;

    /// A setup header with one sector of setup code and 4 KiB of kernel. It prefers 16 MiB and needs 2 MiB there.
    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            syssize: 0x100,
            boot_flag: BOOT_SECTOR_MAGIC,
            jump: 0x66eb,
            header: u32::from_le_bytes(MAGIC),
            version: 0x020f,
            loadflags: LOADED_HIGH,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            pref_address: 16 * MIB,
            init_size: 0x20_0000,
            ..setup_header::default()
        }
    }

    /// A file with this header. Each byte of the kernel is 0xf4.
    fn bzimage(header: setup_header) -> Vec<u8> {
        let mut file = vec![0; 1024 + 4096];
        let bytes = Setup(header);
        file[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(bytes.as_slice());
        file[1024..].fill(0xf4);
        file
    }

    fn changed(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = header();
        change(&mut header);
        bzimage(header)
    }

    /// Loads the kernel `content` from the middle of a file.
    fn load_into(memory: &MemoryRegions, content: &[u8]) -> Result<LoadedKernel, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 4096]).unwrap();
        file.write_all(content).unwrap();
        let extent = Extent {
            offset: 4096,
            length: content.len() as u64,
        };
        kernel::load(memory, &file, extent)
    }

    fn try_load(content: &[u8]) -> Result<(LoadedKernel, MemoryRegions), KernelError> {
        let memory = allocate(32 * MIB, None).unwrap();
        let loaded = load_into(&memory, content)?;
        Ok((loaded, memory))
    }

    #[test]
    fn kernel_is_loaded_at_its_preferred_address_and_keeps_its_header() {
        let (loaded, memory) = try_load(&bzimage(header())).unwrap();

        assert_eq!(loaded.entry, 16 * MIB + 0x200);
        assert_eq!(loaded.end, 18 * MIB);
        assert_eq!(loaded.setup, Some(header()));
        assert_eq!(loaded.max_initramfs_address(), Some(0x7fff_ffff));
        assert_eq!(loaded.max_command_line(), Some(2047));
        let mut kernel = vec![0; 4097];
        memory.read_slice(&mut kernel, GuestAddress(16 * MIB)).unwrap();
        assert_eq!(kernel[..4096], [0xf4; 4096]);
        assert_eq!(kernel[4096], 0);
    }

    #[test]
    fn header_ends_where_its_jump_leads() {
        let header = setup_header {
            jump: 0x62eb,
            handover_offset: 7,
            ..header()
        };

        let (loaded, _) = try_load(&bzimage(header)).unwrap();

        let setup = loaded.setup.unwrap();
        assert_eq!({ setup.init_size }, 0x20_0000);
        assert_eq!({ setup.handover_offset }, 0);
    }

    #[test]
    fn bytes_after_the_kernel_are_ignored() {
        let mut signed = bzimage(header());
        signed.extend([0x5a; 700]);

        let (_, memory) = try_load(&signed).unwrap();

        assert_eq!(memory.read_obj::<u8>(GuestAddress(16 * MIB + 4096)).unwrap(), 0);
    }

    #[test]
    fn relocatable_kernel_moves_to_an_aligned_address_in_high_memory() {
        for (preferred, expected) in [
            (0, 2 * MIB),
            (0x1000, 2 * MIB),
            (3 * MIB, 4 * MIB),
            (30 * MIB, 30 * MIB),
        ] {
            let (loaded, _) = try_load(&changed(|header| header.pref_address = preferred)).unwrap();
            assert_eq!(loaded.entry, expected + 0x200, "{preferred:#x}");
        }
        let fixed = changed(|header| {
            header.relocatable_kernel = 0;
            header.kernel_alignment = 0;
            header.pref_address = 3 * MIB + 16;
        });
        assert_eq!(try_load(&fixed).unwrap().0.entry, 3 * MIB + 16 + 0x200);
    }

    #[test]
    fn setup_sector_count_0_means_4_sectors() {
        let mut file = changed(|header| header.setup_sects = 0);
        file.splice(1024..1024, [0; 3 * 512]);

        let (_, memory) = try_load(&file).unwrap();

        assert_eq!(memory.read_obj::<u8>(GuestAddress(16 * MIB)).unwrap(), 0xf4);
    }

    #[test]
    fn invalid_kernels_are_refused_with_the_reason() {
        type Change = fn(&mut setup_header);
        let cases: [(&str, Change); 15] = [
            ("no boot sector magic", |header| header.boot_flag = 0x55aa),
            ("neither an ELF vmlinux nor a bzImage", |header| header.header = 0),
            ("older than 2.12", |header| header.version = 0x020b),
            ("zImage", |header| header.loadflags = 0),
            ("XLF_KERNEL_64", |header| header.xloadflags = !XLF_KERNEL_64),
            ("init_size", |header| header.init_size = 0),
            ("setup header is too short", |header| header.jump = 0x61eb),
            ("truncated", |header| header.syssize = 0x101),
            ("truncated", |header| header.syssize = u32::MAX),
            ("truncated", |header| header.setup_sects = 255),
            ("ends before its entry point", |header| header.syssize = 0x20),
            ("alignment", |header| header.kernel_alignment = 3),
            ("alignment", |header| header.kernel_alignment = 0),
            ("load address is too high", |header| header.pref_address = u64::MAX),
            ("below 1 MiB", |header| {
                header.relocatable_kernel = 0;
                header.pref_address = 0x1000;
            }),
        ];
        for (expected, change) in cases {
            let error = try_load(&changed(change)).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn kernel_that_does_not_fit_into_memory_is_refused_with_the_size_that_it_needs() {
        type Change = fn(&mut setup_header);
        let cases: [Change; 5] = [
            |header| header.init_size = 16 * 0x10_0000 + 1,
            |header| header.init_size = u32::MAX,
            |header| header.pref_address = 32 * MIB,
            |header| header.pref_address = 0xfee0_0000,
            |header| {
                header.relocatable_kernel = 0;
                header.pref_address = u64::MAX;
            },
        ];
        for change in cases {
            let error = try_load(&changed(change)).unwrap_err();
            assert!(matches!(error, KernelError::TooLarge { .. }), "{error}");
        }
        try_load(&changed(|header| header.init_size = 16 * 0x10_0000)).unwrap();
    }

    #[test]
    fn every_truncated_file_is_refused() {
        let file = bzimage(header());
        let memory = allocate(32 * MIB, None).unwrap();
        for length in 0..file.len() {
            assert!(load_into(&memory, &file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn kernel_with_any_byte_of_its_header_changed_is_refused_or_lies_in_memory() {
        let memory = allocate(32 * MIB, None).unwrap();
        let usable = HIGH_MEMORY_START..=32 * MIB;
        let mut loaded = 0;
        for offset in 0x1f1..0x1f1 + size_of::<setup_header>() {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let mut file = bzimage(header());
                file[offset] = value;
                if let Ok(kernel) = load_into(&memory, &file) {
                    loaded += 1;
                    assert!(
                        usable.contains(&kernel.entry) && usable.contains(&kernel.end) && kernel.entry < kernel.end,
                        "{value:#x} at {offset:#x}: {kernel:?}"
                    );
                }
            }
        }
        assert!(loaded > 0);
    }

    #[test]
    fn file_that_is_shorter_than_its_extent_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bzimage(header())[..3000]).unwrap();
        let extent = Extent {
            offset: 0,
            length: 1 << 20,
        };
        let memory = allocate(32 * MIB, None).unwrap();
        assert!(kernel::load(&memory, &file, extent).is_err());
    }
}
