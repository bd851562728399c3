//! Guest physical addresses of the boot structures that both boards have, and the entries of the GDT. The kernel's
//! address comes from its file; [`super::pc_layout`] has the firmware tables of the PC board.

/// The global descriptor table.
pub(in crate::vmm) const GDT: u64 = 0x500;
/// The zero page (`boot_params`).
pub(in crate::vmm) const ZERO_PAGE: u64 = 0x7000;
/// The top-level page table. All page tables take three pages.
pub(in crate::vmm) const PAGE_TABLES: u64 = 0x9000;
/// The seed of the guest's random number generator (`SETUP_RNG_SEED`).
pub(super) const RNG_SEED: u64 = 0xd000;
/// The kernel's command line.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
/// The end of the memory for the command line.
pub(super) const COMMAND_LINE_END: u64 = 0x3_0000;
/// The end of usable memory below 640 KiB. The tables of [`super::mptable`] start here.
pub(super) const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The start of usable memory above the legacy hole.
pub(super) const HIGH_MEMORY_START: u64 = 0x10_0000;
/// The end of the memory that [`PAGE_TABLES`] map.
pub(super) const IDENTITY_MAP_END: u64 = 1 << 30;

/// The flat segments that the 64-bit boot protocol requires: null, code and data; and a task state segment, which
/// hardware virtualization requires.
pub(in crate::vmm) const GDT_ENTRIES: [u64; 4] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
