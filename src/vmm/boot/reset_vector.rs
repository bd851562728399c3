//! The code at the address where a BIOS would begin. Linux jumps there to reboot a machine that has hardware-reduced
//! ACPI but was not booted by UEFI: it expects UEFI's reset service in place of ACPI's reset register
//! (`native_machine_emergency_restart` in arch/x86/kernel/reboot.c). Without this code, the machine would hang: the
//! vCPU would execute zeroed memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::pc_layout::{POWER_PORTS, RESET_VECTOR};
use crate::{devices::pc::power::RESET, memory::MemoryRegions};

/// Writes code for real mode that resets the machine.
pub(in crate::vmm) fn write(memory: &MemoryRegions) -> Result<(), GuestMemoryError> {
    memory.write_slice(&code(), GuestAddress(RESET_VECTOR))
}

fn code() -> [u8; 9] {
    const MOV_DX: u8 = 0xba;
    const MOV_AL: u8 = 0xb0;
    const OUT_DX_AL: u8 = 0xee;
    const HLT: u8 = 0xf4;
    /// Jumps back to the `hlt`.
    const JMP_HLT: [u8; 2] = [0xeb, 0xfd];
    let [low, high] = POWER_PORTS.start.to_le_bytes();
    [MOV_DX, low, high, MOV_AL, RESET, OUT_DX_AL, HLT, JMP_HLT[0], JMP_HLT[1]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn code_lies_at_the_start_of_the_last_paragraph_below_1_mib() {
        let memory = allocate(2 << 20, None).unwrap();
        write(&memory).unwrap();
        let mut bytes = [0; 17];
        memory.read_slice(&mut bytes, GuestAddress(0xf_fff0)).unwrap();
        // mov dx, 0x600; mov al, 1; out dx, al; hlt; jmp short -3
        assert_eq!(
            &bytes,
            b"\xba\x00\x06\xb0\x01\xee\xf4\xeb\xfd\x00\x00\x00\x00\x00\x00\x00\x00"
        );
    }
}
