//! The MP table (Intel MultiProcessor Specification 1.4): the list of vCPUs, and the I/O APIC line of each interrupt.
//! It is smaller and faster to parse than ACPI, and sufficient for a machine without PCI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::LOW_MEMORY_END;
use crate::memory::MemoryRegions;

/// The number of lines of KVM's I/O APIC.
pub(in crate::vmm) const IO_APIC_LINES: u8 = 24;

const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
/// Flags of processor and I/O APIC entries (§4.3.1, §4.3.3).
const FLAG_ENABLED: u8 = 1;
const FLAG_BOOT_PROCESSOR: u8 = 2;

/// Entry types (§4.3).
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (§4.3.4).
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

/// Writes the table for `vcpus` vCPUs, with APIC IDs from 0 on.
pub(in crate::vmm) fn write(memory: &MemoryRegions, vcpus: u8) -> Result<(), GuestMemoryError> {
    let pointer = LOW_MEMORY_END;
    let table = pointer + 16;
    memory.write_slice(&floating_pointer(table), GuestAddress(pointer))?;
    memory.write_slice(&configuration_table(vcpus), GuestAddress(table))
}

/// The MP floating pointer structure (§4.1).
fn floating_pointer(table: u64) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&table.to_le_bytes()[..4]);
    pointer[8] = 1;
    pointer[9] = 4;
    pointer[10] = checksum(&pointer);
    pointer
}

/// The MP configuration table (§4.2 and §4.3).
fn configuration_table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = FLAG_ENABLED | if id == 0 { FLAG_BOOT_PROCESSOR } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        // CPU family 6, and features FPU and APIC. Linux does not read them: it uses CPUID.
        processor[4..6].copy_from_slice(&[0, 6]);
        processor[8..12].copy_from_slice(&0x0201_u32.to_le_bytes());
        entry(&processor);
    }
    // The only bus: entry type 1, bus ID 0.
    entry(b"\x01\x00ISA   ");
    let mut io_apic = [ENTRY_IO_APIC, io_apic_id, APIC_VERSION, FLAG_ENABLED, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC_ADDRESS.to_le_bytes());
    entry(&io_apic);
    // Flags 0: polarity and trigger mode of the bus. ISA is active high and edge-triggered.
    for line in 0..IO_APIC_LINES {
        entry(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, 0, line, io_apic_id, line]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0; 44];
    let length = u16::try_from(table.len() + entries.len()).unwrap_or(u16::MAX);
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"NUTSHELL");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC_ADDRESS.to_le_bytes());
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn checksums_length_and_processor_entries_are_correct() {
        for vcpus in [1, 2, 64] {
            let memory = allocate(2 << 20, None).unwrap();
            write(&memory, vcpus).unwrap();
            let mut pointer = [0; 16];
            memory.read_slice(&mut pointer, GuestAddress(LOW_MEMORY_END)).unwrap();
            assert_eq!(checksum(&pointer), 0);
            let mut length = [0; 2];
            memory
                .read_slice(&mut length, GuestAddress(LOW_MEMORY_END + 20))
                .unwrap();
            let mut table = vec![0; u16::from_le_bytes(length).into()];
            memory
                .read_slice(&mut table, GuestAddress(LOW_MEMORY_END + 16))
                .unwrap();
            assert_eq!(checksum(&table), 0, "{vcpus} vCPUs");
            let processors = table[44..]
                .chunks(20)
                .take_while(|entry| entry[0] == ENTRY_PROCESSOR && entry.len() == 20)
                .count();
            assert!(processors >= usize::from(vcpus));
        }
    }
}
