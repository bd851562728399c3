//! The MultiProcessor table (Intel MultiProcessor Specification 1.4): which processors there are
//! and which line of the I/O APIC each interrupt has. Smaller and faster to read for the guest
//! than ACPI, and all that a machine without PCI needs.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::LOW_MEMORY_END;
use crate::memory::MemoryRegions;

/// How many lines the I/O APIC of KVM has.
pub(crate) const LINES: u8 = 24;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

/// Entry types (§4.3).
const PROCESSOR: u8 = 0;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (§4.3.4).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// Writes the table for `vcpus` processors, whose APIC ids are 0 and up.
pub(crate) fn write(memory: &MemoryRegions, vcpus: u8) -> Result<(), GuestMemoryError> {
    let pointer = LOW_MEMORY_END;
    let table = pointer + 16;
    memory.write_slice(&floating_pointer(table), GuestAddress(pointer))?;
    memory.write_slice(&configuration(vcpus), GuestAddress(table))
}

/// §4.1.
fn floating_pointer(table: u64) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&table.to_le_bytes()[..4]);
    pointer[8] = 1;
    pointer[9] = 4;
    pointer[10] = checksum(&pointer);
    pointer
}

/// §4.2 and §4.3.
fn configuration(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, id, APIC_VERSION, flags]);
        // Family 6, and a feature word with FPU and APIC: unread by Linux, which asks CPUID.
        processor[4..6].copy_from_slice(&[0, 6]);
        processor[8..12].copy_from_slice(&0x0201_u32.to_le_bytes());
        entry(&processor);
    }
    // The one bus: entry type 1, id 0.
    entry(b"\x01\x00ISA   ");
    let mut io_apic = [IO_APIC_ENTRY, io_apic_id, APIC_VERSION, ENABLED, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    entry(&io_apic);
    // Flags 0: polarity and trigger as the bus has them, which for ISA is high and edge.
    for line in 0..LINES {
        entry(&[IO_INTERRUPT, VECTORED, 0, 0, 0, line, io_apic_id, line]);
    }
    entry(&[LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0; 44];
    let length = u16::try_from(table.len() + entries.len()).unwrap_or(u16::MAX);
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"NUTSHELL");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes all bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn both_structures_sum_to_zero_and_the_length_is_right() {
        for vcpus in [1, 2, 64] {
            let memory = allocate(2 << 20, false).unwrap();
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
                .take_while(|entry| entry[0] == PROCESSOR && entry.len() == 20)
                .count();
            assert!(processors >= usize::from(vcpus));
        }
    }
}
