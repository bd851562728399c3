//! Tests of the ACPI tables, with ACPICA's disassembler and compiler.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use tempfile::TempDir;

use super::*;
use crate::memory::allocate;

const VCPU_COUNTS: [Vcpus; 4] = [
    Vcpus { enabled: 1, max: 1 },
    Vcpus { enabled: 4, max: 4 },
    Vcpus { enabled: 2, max: 64 },
    Vcpus { enabled: 255, max: 255 },
];

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The table at guest physical address `address`, with a correct checksum.
fn table_at(memory: &[u8], address: u64) -> &[u8] {
    let table = &memory[usize::try_from(address - RSDP).unwrap()..];
    let table = &table[..u32_at(table, 4) as usize];
    assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
    table
}

/// The memory of a machine from [`RSDP`] on, and its tables in the order in which a guest finds them.
fn written_tables(vcpus: Vcpus) -> (Vec<u8>, Vec<Vec<u8>>) {
    let memory = allocate(2 << 20, None).unwrap();
    write(&memory, vcpus).unwrap();
    let mut bytes = vec![0; usize::try_from(ACPI_END - RSDP).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(RSDP)).unwrap();
    let xsdt = table_at(&bytes, u64_at(&bytes, 24));
    let mut tables = vec![xsdt.to_vec()];
    for entry in xsdt[36..].chunks(8) {
        tables.push(table_at(&bytes, u64_at(entry, 0)).to_vec());
    }
    let dsdt = u64_at(&tables[1], 140);
    tables.push(table_at(&bytes, dsdt).to_vec());
    (bytes, tables)
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new("iasl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("cannot run iasl: install the package acpica-tools, or run `make unit`")
}

/// Disassembles `table`. Fails on any complaint.
fn disassemble(table: &[u8]) -> String {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("table.aml"), table).unwrap();
    let output = run(folder.path(), &["-d", "table.aml"]);
    let messages = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{messages}");
    let text = fs::read_to_string(folder.path().join("table.dsl")).unwrap();
    for complaint in ["warning", "error", "invalid", "unknown", "incorrect", "unresolved"] {
        for source in [&messages, &text] {
            assert!(
                !source.to_lowercase().contains(complaint),
                "{complaint}: {messages}\n{text}"
            );
        }
    }
    text
}

/// The names and values of a disassembled static table.
fn fields(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        // Fields that are not parts of another one start with their offset.
        let line = line
            .strip_prefix('[')
            .and_then(|line| line.split_once(']'))
            .map_or(line, |(_, line)| line);
        let (name, value) = line.split_once(" : ")?;
        Some((name.trim(), value.trim()))
    })
}

/// The value of the first field with this name.
fn field<'t>(text: &'t str, name: &str) -> &'t str {
    let field = fields(text).find(|(candidate, _)| *candidate == name);
    field.unwrap_or_else(|| panic!("no {name}: {text}")).1
}

/// Address space, width in bits, access size and address of a register.
fn register<'t>(text: &'t str, name: &str) -> [&'t str; 4] {
    let (_, text) = text
        .split_once(&format!("{name} : [Generic Address Structure]"))
        .unwrap();
    ["Space ID", "Bit Width", "Encoded Access Width", "Address"].map(|name| field(text, name))
}

#[test]
fn root_pointer_leads_to_all_tables_with_correct_checksums_and_sizes() {
    for vcpus in VCPU_COUNTS {
        let (memory, tables) = written_tables(vcpus);

        assert_eq!(&memory[..8], b"RSD PTR ");
        assert_eq!(sum(&memory[..20]), 0);
        assert_eq!(sum(&memory[..36]), 0);
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
        assert_eq!(tables[1].len(), 276);
        assert_eq!(tables[2].len(), 44 + 8 * usize::from(vcpus.max) + 12 + 10 + 6);
        assert!(build(vcpus).len() < 0x1000);
    }
}

#[test]
fn madt_lists_each_vcpu_and_only_enabled_ones_can_be_started() {
    for vcpus in VCPU_COUNTS {
        let (_, tables) = written_tables(vcpus);
        let text = disassemble(&tables[2]);
        let processors: Vec<_> = text.split("[Processor Local APIC]").skip(1).collect();
        assert_eq!(processors.len(), usize::from(vcpus.max));
        for (index, text) in processors.iter().enumerate() {
            assert_eq!(field(text, "Local Apic ID"), format!("{index:02X}"));
            let enabled = index < usize::from(vcpus.enabled);
            assert_eq!(field(text, "Processor Enabled"), if enabled { "1" } else { "0" });
            assert_eq!(
                field(text, "Flags (decoded below)"),
                if enabled { "00000001" } else { "00000002" }
            );
        }
    }
}

#[test]
fn madt_describes_the_interrupt_controllers_and_an_edge_triggered_event_line() {
    let (_, tables) = written_tables(VCPU_COUNTS[0]);
    let text = disassemble(&tables[2]);
    assert_eq!(field(&text, "Local Apic Address"), "FEE00000");
    assert_eq!(field(&text, "PC-AT Compatibility"), "0");
    let (_, io_apic) = text.split_once("[I/O APIC]").unwrap();
    assert_eq!(field(io_apic, "I/O Apic ID"), "00");
    assert_eq!(field(io_apic, "Address"), "FEC00000");
    assert_eq!(field(io_apic, "Interrupt"), "00000000");
    let (_, line) = text.split_once("[Interrupt Source Override]").unwrap();
    assert_eq!(field(line, "Source"), "09");
    assert_eq!(field(line, "Interrupt"), "00000009");
    assert_eq!(field(line, "Polarity"), "1");
    assert_eq!(field(line, "Trigger Mode"), "1");
    let (_, nmi) = text.split_once("[Local APIC NMI]").unwrap();
    assert_eq!(field(nmi, "Processor ID"), "FF");
    assert_eq!(field(nmi, "Interrupt Input LINT"), "01");
}

#[test]
fn fadt_has_the_registers_of_hardware_reduced_acpi_and_no_legacy_devices() {
    let (_, tables) = written_tables(VCPU_COUNTS[0]);
    let text = disassemble(&tables[1]);
    for (name, expected) in [
        ("Hardware Reduced (V5)", "1"),
        ("Reset Register Supported (V2)", "1"),
        ("Control Method Power Button (V1)", "1"),
        ("Control Method Sleep Button (V1)", "1"),
        ("32-bit PM Timer (V1)", "1"),
        ("Legacy Devices Supported (V2)", "0"),
        ("8042 Present on ports 60/64 (V2)", "0"),
        ("VGA Not Present (V4)", "1"),
        ("CMOS RTC Not Present (V5)", "1"),
        ("MSI Not Supported (V4)", "0"),
        ("Value to cause reset", "01"),
        ("SCI Interrupt", "0000"),
    ] {
        assert_eq!(field(&text, name), expected, "{name}");
    }
    let byte = ["01 [SystemIO]", "08", "01 [Byte Access:8]", "0000000000000600"];
    assert_eq!(register(&text, "Reset Register"), byte);
    assert_eq!(register(&text, "Sleep Control Register"), byte);
    assert_eq!(register(&text, "Sleep Status Register"), byte);
    let timer = ["01 [SystemIO]", "20", "03 [DWord Access:32]", "0000000000000608"];
    assert_eq!(register(&text, "PM Timer Block"), timer);
}

#[test]
fn mcfg_has_the_configuration_space_of_bus_0() {
    let (_, tables) = written_tables(VCPU_COUNTS[0]);
    let text = disassemble(&tables[3]);
    assert_eq!(field(&text, "Base Address"), "00000000E0000000");
    assert_eq!(field(&text, "Segment Group Number"), "0000");
    assert_eq!(field(&text, "Start Bus Number"), "00");
    assert_eq!(field(&text, "End Bus Number"), "00");
}

#[test]
fn dsdt_declares_the_devices_and_compiles_without_a_warning() {
    let (_, tables) = written_tables(VCPU_COUNTS[0]);
    let text = disassemble(&tables[4]);
    // One line, without comments and repeated space.
    let mut words = String::new();
    for line in text.lines() {
        for word in line.split("//").next().unwrap_or_default().split_whitespace() {
            words.push_str(word);
            words.push(' ');
        }
    }
    for expected in [
        "Device (PCI0) { Name (_HID, EisaId (\"PNP0A08\") /* PCI Express Bus */) \
         Name (_CID, EisaId (\"PNP0A03\") /* PCI Bus */)",
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x0000, 0x0000, 0x0001, ,, )",
        "IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )",
        "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0x0000, 0x1000, 0xEFFF, 0x0000, 0xE000,",
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, 0x00000000, \
         0xC0000000, 0xDFFFFFFF, 0x00000000, 0x20000000,",
        "Memory32Fixed (ReadWrite, 0xE0000000, 0x00100000, )",
        "IO (Decode16, 0x0600, 0x0600, 0x01, 0x01, )",
        "IO (Decode16, 0x0608, 0x0608, 0x01, 0x04, )",
        "IO (Decode16, 0x0610, 0x0610, 0x01, 0x04, )",
        "Device (COM1) { Name (_HID, EisaId (\"PNP0501\")",
        "IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) \
         Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }",
        "Name (_HID, \"ACPI0013\"",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000009, }",
        "OperationRegion (GREG, SystemIO, 0x0610, 0x04)",
        "Device (PWRB) { Name (_HID, EisaId (\"PNP0C0C\")",
        "If ((Local0 & One)) { Notify (\\_SB.PWRB, 0x80)",
        "Name (_S5, Package (0x02) { 0x05, Zero })",
    ] {
        assert!(words.contains(expected), "{expected}: {words}");
    }

    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("dsdt.dsl"), &text).unwrap();

    let output = run(folder.path(), &["-we", "dsdt.dsl"]);

    let messages = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && messages.contains("0 Errors, 0 Warnings, 0 Remarks"),
        "{messages}"
    );
}
