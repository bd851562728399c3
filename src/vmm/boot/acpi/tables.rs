//! The static tables: FADT, MADT, MCFG and XSDT.

use acpi_tables::{
    Aml,
    fadt::{FADT, FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, ProcessorLocalApic},
    mcfg::MCFG,
    sdt::Sdt,
    xsdt::XSDT,
};

use crate::vmm::boot::pc_layout::{ECAM, EVENT_LINE, IO_APIC, LOCAL_APIC, PM_TIMER_PORTS, POWER_PORTS};

pub(super) const OEM_ID: [u8; 6] = *b"NUTSHL";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"NUTSHELL";
pub(super) const OEM_REVISION: u32 = 1;

/// Flags of `IAPC_BOOT_ARCH` (ACPI 6.5 §5.2.9.3). Without the flags of bits 0 and 1, there are neither legacy devices
/// nor an 8042 keyboard controller.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// The value that resets the machine when it is written to the reset register.
const RESET_VALUE: u8 = 1;

/// The revision of the MADT in ACPI 6.5 (§5.2.12). Flag "online capable" needs at least 5.
const MADT_REVISION: u8 = 6;
/// The size of the MADT's header, in bytes: a table header, the address of the local APICs, and flags.
const MADT_HEADER_SIZE: u32 = 44;
/// The ID that KVM's I/O APIC has at reset.
const IO_APIC_ID: u8 = 0;

/// The vCPUs of a machine. Their APIC IDs start at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vmm) struct Vcpus {
    /// The number of vCPUs that the guest may start.
    pub(in crate::vmm) enabled: u8,
    /// The maximum number of vCPUs, at least `enabled`. The rest cannot be started before they are hot-added.
    pub(in crate::vmm) max: u8,
}

/// The FADT (ACPI 6.5 §5.2.9), with the address of the DSDT.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless)
        // The power button is a device in the DSDT. There are no fixed buttons, and no clock that could wake the
        // machine.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    let power_register = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        POWER_PORTS.start.into(),
    );
    fadt.reset_reg = power_register;
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = power_register;
    fadt.sleep_status_reg = power_register;
    // Hardware-reduced ACPI defines no PM timer (§4.1). Linux uses one anyway: it calibrates the TSC against it if the
    // machine has no PIT, HPET or KVM clock.
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORTS.start).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = GAS::new(
        AddressSpace::SystemIo,
        32,
        0,
        AccessSize::DwordAccess,
        PM_TIMER_PORTS.start.into(),
    );
    fadt.finalize()
}

/// The MADT (ACPI 6.5 §5.2.12): local APICs, the I/O APIC and its lines. Line n is global system interrupt n, as in
/// KVM's routing table. Without the flag `PCAT_COMPAT` there is no 8259 interrupt controller.
pub(super) fn madt(vcpus: Vcpus) -> Sdt {
    let mut madt = Sdt::new(
        *b"APIC",
        MADT_HEADER_SIZE,
        MADT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.write_u32(36, LOCAL_APIC);
    for id in 0..vcpus.max {
        let status = if id < vcpus.enabled {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        append(&mut madt, &ProcessorLocalApic::new(id, id, status));
    }
    append(&mut madt, &IoApic::new(IO_APIC_ID, IO_APIC, 0));
    madt.append_slice(&interrupt_override(EVENT_LINE));
    madt.append_slice(&LOCAL_NMI);
    madt
}

fn append(table: &mut Sdt, entry: &dyn Aml) {
    let mut bytes = Vec::new();
    entry.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}

/// An interrupt source override (ACPI 6.5 §5.2.12.5) that keeps the number of `line`, and makes it edge-triggered and
/// active high. Without it, operating systems treat line 9 as level-triggered, because it is the system control
/// interrupt of a PC.
fn interrupt_override(line: u8) -> [u8; 10] {
    const ACTIVE_HIGH: u8 = 0b01;
    const EDGE_TRIGGERED: u8 = 0b01 << 2;
    [2, 10, 0, line, line, 0, 0, 0, ACTIVE_HIGH | EDGE_TRIGGERED, 0]
}

/// NMIs arrive at pin LINT1 of each local APIC (ACPI 6.5 §5.2.12.7).
const LOCAL_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];

/// The MCFG (PCI Firmware Specification 3.3 §4.1.2): the configuration space of bus 0 of segment 0.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

/// The XSDT (ACPI 6.5 §5.2.8), with the addresses of the other tables.
pub(super) fn xsdt(entries: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(*entry);
    }
    xsdt
}
