//! The DSDT (ACPI 6.5 §5.2.11.1): devices that the guest cannot probe, in AML.

use std::ops::Range;

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
        FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace,
        Package, Path, ResourceTemplate, Scope, Store, ZERO,
    },
    sdt::Sdt,
};

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::{
    devices::pc::{ged::POWER_BUTTON, power::POWER_OFF_SLEEP_TYPE},
    vmm::boot::pc_layout::{
        BAR_WINDOW, COM1_LINE, COM1_PORTS, ECAM, EVENT_LINE, EVENT_PORTS, PCI_CONFIG_PORTS, PCI_PORTS, PM_TIMER_PORTS,
        POWER_PORTS,
    },
};

/// From revision 2 on, integers have 64 bits.
const REVISION: u8 = 2;
/// The size of a table's header, in bytes (ACPI 6.5 §5.2.6).
const HEADER_SIZE: u32 = 36;
/// The notification that a button was pressed (ACPI 6.5 §5.6.6).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn build() -> Sdt {
    let mut aml = Vec::new();
    Scope::new(
        "_SB_".into(),
        vec![
            &PciHostBridge,
            &MotherboardResources,
            &Com1,
            &GenericEventDevice,
            &PowerButton,
        ],
    )
    .to_aml_bytes(&mut aml);
    // The sleep types of S5, power off (§7.4.2), for PM1a_CNT and PM1b_CNT. Hardware-reduced ACPI uses only the first.
    let sleep_types: [&dyn Aml; 2] = [&POWER_OFF_SLEEP_TYPE, &ZERO];
    Name::new("_S5_".into(), &Package::new(sleep_types.to_vec())).to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_SIZE, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// The PCI Express host bridge of bus 0 (PCI Firmware Specification 3.3 §4), which is compatible with a bridge of
/// conventional PCI. It has no `_PRT`: devices interrupt by MSI-X only.
struct PciHostBridge;

impl Aml for PciHostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let bars = to_u32_range(&BAR_WINDOW);
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0_u16, 0),
                        &ports(&PCI_CONFIG_PORTS),
                        &AddressSpace::new_io(PCI_PORTS.start, PCI_PORTS.end - 1, None),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            bars.start,
                            bars.end - 1,
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Addresses that no driver of another device claims. The ECAM must be among them (PCI Firmware Specification 3.3
/// §4.1.2).
struct MotherboardResources;

impl Aml for MotherboardResources {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let ecam = to_u32_range(&ECAM);
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, ecam.start, ecam.end - ecam.start),
                        &ports(&POWER_PORTS),
                        &ports(&PM_TIMER_PORTS),
                        &ports(&EVENT_PORTS),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A 16550A-compatible serial port.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&ports(&COM1_PORTS), &edge_triggered(COM1_LINE)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The generic event device (ACPI 6.5 §5.6.9): its interrupt makes the guest evaluate `_EVT`, which reads the pending
/// events and notifies their devices.
struct GenericEventDevice;

impl Aml for GenericEventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let length = EVENT_PORTS.end - EVENT_PORTS.start;
        let (events, power_button) = (Path::new("GEVT"), Path::new("\\_SB_.PWRB"));
        Device::new(
            "GED0".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge_triggered(EVENT_LINE)])),
                &OpRegion::new("GREG".into(), OpRegionSpace::SystemIO, &EVENT_PORTS.start, &length),
                &Field::new(
                    "GREG".into(),
                    FieldAccessType::DWord,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"GEVT", usize::from(length) * 8)],
                ),
                // Serialized, because reading the register clears the pending events.
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![
                        &Store::new(&Local(0), &events),
                        &If::new(
                            &And::new(&ZERO, &Local(0), &POWER_BUTTON),
                            vec![&Notify::new(&power_button, &BUTTON_PRESSED)],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The power button as a device (ACPI 6.5 §4.8.2.2.1.2).
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn ports(range: &Range<u16>) -> IO {
    let length = u8::try_from(range.end - range.start).unwrap_or(u8::MAX);
    IO::new(range.start, range.start, 1, length)
}

/// Line `line` of the I/O APIC: edge-triggered, active high, not shared.
fn edge_triggered(line: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, line.into())
}

fn to_u32_range(range: &Range<u64>) -> Range<u32> {
    let to_u32 = |address| u32::try_from(address).unwrap_or(u32::MAX);
    to_u32(range.start)..to_u32(range.end)
}
