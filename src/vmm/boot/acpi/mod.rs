//! The ACPI tables of the PC board (ACPI 6.5): what the guest cannot probe. They describe vCPUs and the I/O APIC, the
//! PCI host bridge, COM1, the power button, and the registers for power off, reset and time. ACPI is hardware-reduced
//! (§4.1): it has neither the legacy power management registers nor a system control interrupt.
//!
//! [`tables`] has the static tables, [`dsdt`] the definition block. [`super::pc_layout`] has all addresses. Does not
//! belong here: the devices themselves, in [`crate::devices`]. [`crate::vmm::board::pc`] calls [`write`].

mod dsdt;
mod tables;
#[cfg(test)]
mod tests;

use acpi_tables::{Aml, rsdp::Rsdp};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::tables::OEM_ID;
pub(in crate::vmm) use self::tables::Vcpus;
use super::pc_layout::{ACPI_END, RSDP};
use crate::memory::MemoryRegions;

/// The alignment of the tables in bytes. ACPI requires none, but software expects it.
const ALIGNMENT: usize = 16;

/// Writes the tables to memory, the root pointer to [`RSDP`].
pub(in crate::vmm) fn write(memory: &MemoryRegions, vcpus: Vcpus) -> Result<(), GuestMemoryError> {
    let tables = build(vcpus);
    debug_assert!(RSDP + tables.len() as u64 <= ACPI_END);
    memory.write_slice(&tables, GuestAddress(RSDP))
}

/// The root pointer and all tables, for address [`RSDP`].
fn build(vcpus: Vcpus) -> Vec<u8> {
    let mut tables = vec![0; Rsdp::len()];
    let dsdt = append(&mut tables, &dsdt::build());
    let entries = [
        append(&mut tables, &tables::fadt(dsdt)),
        append(&mut tables, &tables::madt(vcpus)),
        append(&mut tables, &tables::mcfg()),
    ];
    let xsdt = append(&mut tables, &tables::xsdt(&entries));
    let root = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    tables[..root.len()].copy_from_slice(&root);
    tables
}

/// Appends `table`, aligned. Returns its guest physical address.
fn append(tables: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    let offset = tables.len().next_multiple_of(ALIGNMENT);
    tables.resize(offset, 0);
    table.to_aml_bytes(tables);
    RSDP + offset as u64
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
