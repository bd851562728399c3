//! The PC board: guest physical addresses, I/O ports and interrupt lines that its firmware tables describe.
//!
//! The structures of the boot protocol lie where [`super::layout`] puts them, on both boards.

use std::ops::Range;

use super::layout::HIGH_MEMORY_START;
use crate::devices::uart;

/// The root pointer of ACPI (RSDP). Linux searches 0xe_0000..0x10_0000 for it if a boot loader does not pass its
/// address (ACPI 6.5 §5.2.5.1).
pub(in crate::vmm) const RSDP: u64 = 0xe_0000;
/// The end of the ACPI tables, which follow the RSDP.
pub(super) const ACPI_END: u64 = SMBIOS;
/// The entry point of SMBIOS, with the structures behind it. Without UEFI, software searches 0xf_0000..0x10_0000 for it
/// (SMBIOS 3.7 §5.2.2).
pub(super) const SMBIOS: u64 = 0xf_0000;
/// The end of the SMBIOS structures.
pub(super) const SMBIOS_END: u64 = RESET_VECTOR;
/// The first instruction of a BIOS after a reset, ffff:0000.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;

/// The memory of PCI BARs.
pub(in crate::vmm) const BAR_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// The configuration space of PCI bus 0, memory-mapped (ECAM).
pub(in crate::vmm) const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O ports that PCI BARs may occupy.
pub(in crate::vmm) const PCI_PORTS: Range<u16> = 0x1000..0xf000;

/// Address ranges that are not free for the kernel's use: firmware tables and code, and [`ECAM`].
pub(in crate::vmm) const RESERVED: [Range<u64>; 2] = [RSDP..HIGH_MEMORY_START, ECAM];

pub(super) const IO_APIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;

/// PCI's configuration address and data registers.
pub(in crate::vmm) const PCI_CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;
/// The serial port COM1.
pub(in crate::vmm) const COM1_PORTS: Range<u16> = uart::FIRST_PORT..uart::FIRST_PORT + uart::PORT_COUNT;
/// The reset register and the sleep registers of ACPI.
pub(in crate::vmm) const POWER_PORTS: Range<u16> = 0x600..0x601;
/// The power management timer of ACPI.
pub(in crate::vmm) const PM_TIMER_PORTS: Range<u16> = 0x608..0x60c;
/// The register of pending events of the generic event device.
pub(in crate::vmm) const EVENT_PORTS: Range<u16> = 0x610..0x614;

/// The I/O APIC line of COM1.
pub(in crate::vmm) const COM1_LINE: u8 = 4;
/// The I/O APIC line of the generic event device.
pub(in crate::vmm) const EVENT_LINE: u8 = 9;
