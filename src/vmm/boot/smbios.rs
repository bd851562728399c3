//! The SMBIOS structures of the PC board (DMTF DSP0134, SMBIOS 3.7): the identity of the machine, and strings by which
//! the host passes settings to the guest's software, such as credentials of systemd.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::pc_layout::{SMBIOS, SMBIOS_END};
use crate::memory::MemoryRegions;

const ENTRY_POINT_SIZE: usize = 24;
/// The address of the first structure. The entry point is before it.
const STRUCTURES: u64 = SMBIOS + 0x20;

/// The version of SMBIOS, major and minor, that the structures conform to. Later versions do not change them.
const VERSION: [u8; 2] = [3, 3];

const MANUFACTURER: &str = "nutshell";
/// Linux disables some PCI and ACPI features if the firmware's date is before their introduction.
const RELEASE_DATE: &str = "01/01/2026";

/// Structure types (§7).
const FIRMWARE: u8 = 0;
const SYSTEM: u8 = 1;
const OEM_STRINGS: u8 = 11;
const BOOT_STATUS: u8 = 32;
const END: u8 = 127;

/// Bit 3 of the firmware's characteristics: they are not stated (§7.1.1).
const CHARACTERISTICS_NOT_STATED: u64 = 1 << 3;
/// Bit 4 of the second extension byte of the firmware's characteristics: the system is a virtual machine (§7.1.2.2).
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// The release number of a component that has none (§7.1).
const NO_RELEASE: u8 = 0xff;
/// The machine was started by its power switch (§7.2.2).
const WAKE_UP_POWER_SWITCH: u8 = 6;

/// Why the structures cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SmbiosError {
    #[error("SMBIOS string {0:?} is empty or contains a NUL byte: remove it")]
    String(String),
    #[error("the machine has {0} SMBIOS OEM strings, but at most 255 are possible: pass fewer")]
    TooManyStrings(usize),
    #[error(
        "the SMBIOS structures have {bytes} bytes, but at most {max} are possible: pass fewer or shorter OEM strings"
    )]
    TooLarge { bytes: usize, max: u64 },
    #[error("guest memory is too small for SMBIOS: {0}: give the machine more memory")]
    Memory(#[from] GuestMemoryError),
}

/// The identity of a machine.
#[derive(Debug, Clone, Copy)]
pub(in crate::vmm) struct SystemIdentity<'s> {
    /// By this name guests recognize the platform.
    pub(in crate::vmm) product: &'s str,
    /// In the byte order of RFC 9562, which is that of its text.
    pub(in crate::vmm) uuid: [u8; 16],
    /// Free-form strings for the guest's software, in their order.
    pub(in crate::vmm) oem_strings: &'s [String],
}

/// Writes the entry point and the structures to memory.
pub(in crate::vmm) fn write(memory: &MemoryRegions, identity: &SystemIdentity<'_>) -> Result<(), SmbiosError> {
    let structures = structures(identity)?;
    let max = SMBIOS_END - STRUCTURES;
    let bytes = structures.len();
    if bytes as u64 > max {
        return Err(SmbiosError::TooLarge { bytes, max });
    }
    let size = u32::try_from(bytes).unwrap_or(u32::MAX);
    memory.write_slice(&entry_point(STRUCTURES, size), GuestAddress(SMBIOS))?;
    Ok(memory.write_slice(&structures, GuestAddress(STRUCTURES))?)
}

/// The 64-bit entry point (§5.2.2) of structures of `size` bytes at `address`.
fn entry_point(address: u64, size: u32) -> [u8; ENTRY_POINT_SIZE] {
    const REVISION: u8 = 1;
    let mut entry = [0; ENTRY_POINT_SIZE];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6..9].copy_from_slice(&[24, VERSION[0], VERSION[1]]);
    entry[10] = REVISION;
    entry[12..16].copy_from_slice(&size.to_le_bytes());
    entry[16..].copy_from_slice(&address.to_le_bytes());
    entry[5] = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

fn structures(identity: &SystemIdentity<'_>) -> Result<Vec<u8>, SmbiosError> {
    let mut structures = Structures::default();
    structures.append(
        FIRMWARE,
        &firmware(),
        &[MANUFACTURER, env!("CARGO_PKG_VERSION"), RELEASE_DATE],
    )?;
    structures.append(SYSTEM, &system(identity.uuid), &[MANUFACTURER, identity.product])?;
    let oem_strings: Vec<&str> = identity.oem_strings.iter().map(String::as_str).collect();
    if !oem_strings.is_empty() {
        let count = u8::try_from(oem_strings.len()).map_err(|_| SmbiosError::TooManyStrings(oem_strings.len()))?;
        structures.append(OEM_STRINGS, &[count], &oem_strings)?;
    }
    // Six reserved bytes, and status 0: no errors.
    structures.append(BOOT_STATUS, &[0; 7], &[])?;
    structures.append(END, &[], &[])?;
    Ok(structures.bytes)
}

/// Firmware information (§7.1) without its header. A string is referred to by its number, from 1 on.
fn firmware() -> Vec<u8> {
    const VENDOR_AND_VERSION: [u8; 2] = [1, 2];
    const NO_SEGMENT: [u8; 2] = [0, 0];
    const RELEASE_DATE_AND_ROM_SIZE: [u8; 2] = [3, 0];
    const NO_EXTENDED_ROM_SIZE: [u8; 2] = [0, 0];
    let mut body = Vec::new();
    body.extend(VENDOR_AND_VERSION);
    body.extend(NO_SEGMENT);
    body.extend(RELEASE_DATE_AND_ROM_SIZE);
    body.extend(CHARACTERISTICS_NOT_STATED.to_le_bytes());
    body.extend([0, VIRTUAL_MACHINE]);
    // Of the firmware and of an embedded controller, major and minor.
    body.extend([NO_RELEASE; 4]);
    body.extend(NO_EXTENDED_ROM_SIZE);
    body
}

/// System information (§7.2) without its header.
fn system(uuid: [u8; 16]) -> Vec<u8> {
    const MANUFACTURER_AND_PRODUCT: [u8; 2] = [1, 2];
    const NO_VERSION_AND_SERIAL_NUMBER: [u8; 2] = [0, 0];
    const NO_SKU_AND_FAMILY: [u8; 2] = [0, 0];
    // The first three fields of a UUID are little-endian (§7.2.1).
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let mut body = Vec::new();
    body.extend(MANUFACTURER_AND_PRODUCT);
    body.extend(NO_VERSION_AND_SERIAL_NUMBER);
    body.extend([d, c, b, a, f, e, h, g]);
    body.extend(rest);
    body.push(WAKE_UP_POWER_SWITCH);
    body.extend(NO_SKU_AND_FAMILY);
    body
}

/// A table of structures. Their handles are their positions.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
}

impl Structures {
    /// Appends a structure (§6.1): header, `body` and strings. The strings end with an empty one, so none may be empty.
    fn append(&mut self, kind: u8, body: &[u8], strings: &[&str]) -> Result<(), SmbiosError> {
        const HEADER_SIZE: u8 = 4;
        let length = HEADER_SIZE + u8::try_from(body.len()).unwrap_or(u8::MAX - HEADER_SIZE);
        self.bytes.extend([kind, length]);
        self.bytes.extend(self.count.to_le_bytes());
        self.bytes.extend(body);
        for string in strings {
            if string.is_empty() || string.contains('\0') {
                return Err(SmbiosError::String((*string).to_owned()));
            }
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;
    use crate::memory::allocate;

    const UUID: [u8; 16] = *b"\x00\x11\x22\x33\x44\x55\x46\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";

    fn identity(oem_strings: &[String]) -> SystemIdentity<'_> {
        SystemIdentity {
            product: "nutshell VM",
            uuid: UUID,
            oem_strings,
        }
    }

    /// Writes the structures, and reads the memory from [`SMBIOS`] to 1 MiB.
    fn written(identity: &SystemIdentity<'_>) -> Result<Vec<u8>, SmbiosError> {
        let memory = allocate(2 << 20, None).unwrap();
        write(&memory, identity)?;
        let mut bytes = vec![0; 0x1_0000];
        memory.read_slice(&mut bytes, GuestAddress(SMBIOS)).unwrap();
        Ok(bytes)
    }

    /// What dmidecode prints for memory from [`SMBIOS`] on. Fails on any complaint.
    fn decode(bytes: &[u8]) -> String {
        let size = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
        // A dump has the structures at offset 0x20.
        let mut dump = entry_point(0x20, size).to_vec();
        dump.resize(0x20, 0);
        dump.extend(&bytes[0x20..0x20 + size as usize]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("dump");
        fs::write(&file, dump).unwrap();
        let output = Command::new("dmidecode")
            .arg("--from-dump")
            .arg(&file)
            .output()
            .expect("cannot run dmidecode: install the package, or run `make unit`");
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && errors.is_empty(), "{errors}{text}");
        for complaint in [
            "BAD",
            "Wrong",
            "Invalid",
            "TRUNCATED",
            "OUT OF SPEC",
            "not fully supported",
        ] {
            assert!(!text.contains(complaint), "{complaint}: {text}");
        }
        text
    }

    #[test]
    fn entry_point_has_a_correct_checksum_and_leads_to_the_structures() {
        let bytes = written(&identity(&[])).unwrap();
        assert_eq!(&bytes[..5], b"_SM3_");
        let sum = bytes[..24].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        assert_eq!(bytes[16..24], 0xf_0020_u64.to_le_bytes());
        let size = usize::from(u16::from_le_bytes([bytes[12], bytes[13]]));
        assert_eq!(bytes[0x20 + size - 6..0x20 + size], [127, 4, 3, 0, 0, 0]);
        assert!(bytes[0x20 + size..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn guest_reads_identity_and_oem_strings() {
        let strings = ["io.systemd.credential:a=b", "ünï", "third"].map(str::to_owned);

        let text = decode(&written(&identity(&strings)).unwrap());

        for expected in [
            "SMBIOS 3.3.0 present",
            "BIOS Information\n\tVendor: nutshell\n\tVersion: ",
            "Release Date: 01/01/2026",
            "System is a virtual machine",
            "System Information\n\tManufacturer: nutshell\n\tProduct Name: nutshell VM\n\tVersion: Not Specified",
            "UUID: 00112233-4455-4677-8899-aabbccddeeff",
            "Wake-up Type: Power Switch",
            "OEM Strings\n\tString 1: io.systemd.credential:a=b\n\tString 2: ",
            "String 3: third",
            "Status: No errors detected",
            "End Of Table",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn machine_without_oem_strings_has_no_structure_for_them() {
        let text = decode(&written(&identity(&[])).unwrap());
        assert!(text.contains("End Of Table") && !text.contains("OEM Strings"), "{text}");
    }

    #[test]
    fn strings_that_would_break_the_structures_are_refused() {
        for string in ["", "a\0b", "\0"] {
            let strings = ["good".to_owned(), string.to_owned()];
            let error = written(&identity(&strings)).unwrap_err();
            assert!(
                matches!(&error, SmbiosError::String(refused) if refused == string),
                "{error}"
            );
        }
        let empty_product = SystemIdentity {
            product: "",
            ..identity(&[])
        };
        assert!(matches!(written(&empty_product), Err(SmbiosError::String(_))));
        let many = vec!["x".to_owned(); 256];
        assert!(matches!(
            written(&identity(&many)),
            Err(SmbiosError::TooManyStrings(256))
        ));
        decode(&written(&identity(&many[..255])).unwrap());
    }

    #[test]
    fn structures_fill_memory_up_to_the_reset_vector_and_not_beyond() {
        let size = structures(&identity(&["x".to_owned()])).unwrap().len();
        let max = usize::try_from(SMBIOS_END - STRUCTURES).unwrap();
        let fits = ["x".repeat(max - size + 1)];
        decode(&written(&identity(&fits)).unwrap());

        let error = written(&identity(&[format!("{}x", fits[0])])).unwrap_err();

        assert!(
            error
                .to_string()
                .contains(&format!("{} bytes, but at most {max}", max + 1)),
            "{error}"
        );
    }
}
