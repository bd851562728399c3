//! Identifies file systems by their superblocks: type, UUID and label, as blkid(8) prints them.

/// How many bytes at the start of a disk or partition [`identify`] and [`crate::partition_types`] need. The last
/// superblock is that of btrfs, at 64 KiB.
pub const START_SIZE: usize = (64 << 10) + 4096;

/// What the superblock of a file system contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The type, as for mount(2), or blkid's name for contents that cannot be mounted.
    pub kind: &'static str,
    /// The UUID; for FAT the volume serial number, for ISO 9660 a time.
    pub uuid: Option<String>,
    /// The name that the user gave it, for `LABEL=`.
    pub label: Option<String>,
}

/// Identifies the file system that begins with `start`. Returns `None` if its type is unknown.
#[must_use]
pub fn identify(start: &[u8]) -> Option<Superblock> {
    ext4(start)
        .or_else(|| xfs(start))
        .or_else(|| btrfs(start))
        .or_else(|| iso9660(start))
        .or_else(|| squashfs(start))
        .or_else(|| erofs(start))
        .or_else(|| luks(start))
        .or_else(|| lvm(start))
        .or_else(|| fat(start))
}

fn ext4(start: &[u8]) -> Option<Superblock> {
    let superblock = start.get(1024..)?;
    (bytes_at(superblock, 0x38)? == [0x53, 0xef]).then(|| Superblock {
        kind: "ext4",
        uuid: bytes_at(superblock, 0x68).map(format_uuid),
        label: text_at::<16>(superblock, 0x78),
    })
}

fn xfs(start: &[u8]) -> Option<Superblock> {
    start.starts_with(b"XFSB").then(|| Superblock {
        kind: "xfs",
        uuid: bytes_at(start, 32).map(format_uuid),
        label: text_at::<12>(start, 108),
    })
}

fn btrfs(start: &[u8]) -> Option<Superblock> {
    let superblock = start.get(64 << 10..)?;
    (bytes_at(superblock, 0x40)? == *b"_BHRfS_M").then(|| Superblock {
        kind: "btrfs",
        uuid: bytes_at(superblock, 0x20).map(format_uuid),
        label: text_at::<256>(superblock, 0x12b),
    })
}

fn iso9660(start: &[u8]) -> Option<Superblock> {
    let descriptor = start.get(32 << 10..)?;
    // The primary volume descriptor (ECMA-119, section 8.4). Its time of modification takes the place of a UUID, and
    // if that is zero, its time of creation.
    (bytes_at(descriptor, 0)? == *b"\x01CD001").then(|| Superblock {
        kind: "iso9660",
        uuid: format_time(descriptor, 830).or_else(|| format_time(descriptor, 813)),
        label: text_at::<32>(descriptor, 40),
    })
}

fn squashfs(start: &[u8]) -> Option<Superblock> {
    start.starts_with(b"hsqs").then_some(kind_only("squashfs"))
}

fn erofs(start: &[u8]) -> Option<Superblock> {
    let superblock = start.get(1024..)?;
    (u32_at(superblock, 0)? == 0xe0f5_e1e2).then(|| Superblock {
        kind: "erofs",
        uuid: bytes_at(superblock, 48).map(format_uuid),
        label: text_at::<16>(superblock, 64),
    })
}

fn luks(start: &[u8]) -> Option<Superblock> {
    start.starts_with(b"LUKS\xba\xbe").then_some(kind_only("crypto_LUKS"))
}

fn lvm(start: &[u8]) -> Option<Superblock> {
    let has_label = |block: &[u8]| block.starts_with(b"LABELONE") && bytes_at(block, 24) == Some(*b"LVM2 001");
    // The label is in one of the first four sectors.
    let is_volume = start.chunks(512).take(4).any(has_label);
    is_volume.then_some(kind_only("LVM2_member"))
}

/// FAT has no magic number. It comes last, because other file systems may leave an old FAT boot sector in place.
fn fat(start: &[u8]) -> Option<Superblock> {
    if bytes_at(start, 510)? != [0x55, 0xaa] {
        return None;
    }
    let at = if bytes_at(start, 0x52)? == *b"FAT32   " {
        0x43
    } else if matches!(&bytes_at::<8>(start, 0x36)?, b"FAT12   " | b"FAT16   " | b"FAT     ") {
        0x27
    } else {
        return None;
    };
    let serial = u32_at(start, at)?;
    Some(Superblock {
        kind: "vfat",
        uuid: Some(format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)),
        label: text_at::<11>(start, at + 4).filter(|label| label != "NO NAME"),
    })
}

fn kind_only(kind: &'static str) -> Superblock {
    Superblock {
        kind,
        uuid: None,
        label: None,
    }
}

fn format_uuid(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Formats a time of ISO 9660: sixteen digits, from the year to hundredths of a second.
fn format_time(descriptor: &[u8], at: usize) -> Option<String> {
    let digits = bytes_at::<16>(descriptor, at)?;
    if !digits.iter().all(u8::is_ascii_digit) || digits.iter().all(|digit| *digit == b'0') {
        return None;
    }
    let digits = String::from_utf8_lossy(&digits);
    let parts = [0..4, 4..6, 6..8, 8..10, 10..12, 12..14, 14..16];
    Some(parts.map(|range| digits[range].to_owned()).join("-"))
}

/// Returns the text of `SIZE` bytes at `at`, up to a NUL byte, or `None` if it is empty.
fn text_at<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<String> {
    let text = bytes_at::<SIZE>(bytes, at)?;
    let text = text.split(|byte| *byte == 0).next()?;
    let text = String::from_utf8_lossy(text).trim_end().to_owned();
    (!text.is_empty()).then_some(text)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

pub(crate) fn bytes_at<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<[u8; SIZE]> {
    bytes.get(at..at.checked_add(SIZE)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = [
        0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef,
    ];

    const UUID_TEXT: &str = "12345678-9abc-def0-0123-456789abcdef";

    #[test]
    fn file_systems_are_identified() {
        type Parts<'p> = &'p [(usize, &'p [u8])];
        let rows: [(&str, Parts<'_>, Option<&str>, Option<&str>); 10] = [
            (
                "ext4",
                &[(1080, b"\x53\xef"), (1128, &UUID), (1144, b"root")],
                Some(UUID_TEXT),
                Some("root"),
            ),
            (
                "xfs",
                &[(0, b"XFSB"), (32, &UUID), (108, b"data")],
                Some(UUID_TEXT),
                Some("data"),
            ),
            (
                "btrfs",
                &[(65600, b"_BHRfS_M"), (65568, &UUID), (65835, b"fedora")],
                Some(UUID_TEXT),
                Some("fedora"),
            ),
            (
                "iso9660",
                &[
                    (32768, b"\x01CD001"),
                    (33598, b"2024031512345600"),
                    (32808, b"CDROM   "),
                ],
                Some("2024-03-15-12-34-56-00"),
                Some("CDROM"),
            ),
            ("squashfs", &[(0, b"hsqs")], None, None),
            (
                "erofs",
                &[(1024, b"\xe2\xe1\xf5\xe0"), (1072, &UUID)],
                Some(UUID_TEXT),
                None,
            ),
            ("crypto_LUKS", &[(0, b"LUKS\xba\xbe")], None, None),
            ("LVM2_member", &[(512, b"LABELONE"), (536, b"LVM2 001")], None, None),
            (
                "vfat",
                &[
                    (510, b"\x55\xaa"),
                    (0x52, b"FAT32   "),
                    (0x43, b"\x78\x56\x34\x12EFI        "),
                ],
                Some("1234-5678"),
                Some("EFI"),
            ),
            (
                "vfat",
                &[
                    (510, b"\x55\xaa"),
                    (0x36, b"FAT16   "),
                    (0x27, b"\x0d\x0c\x0b\x0aNO NAME    "),
                ],
                Some("0A0B-0C0D"),
                None,
            ),
        ];
        for (kind, parts, uuid, label) in rows {
            let mut start = vec![0; START_SIZE];
            for (at, bytes) in parts {
                start[*at..*at + bytes.len()].copy_from_slice(bytes);
            }
            let expected = Superblock {
                kind,
                uuid: uuid.map(str::to_owned),
                label: label.map(str::to_owned),
            };
            assert_eq!(identify(&start), Some(expected));
        }
    }

    #[test]
    fn empty_or_short_start_is_not_identified() {
        for size in [0, 1, 511, 512, 1024, START_SIZE] {
            assert_eq!(identify(&vec![0; size]), None, "{size} bytes");
        }
    }
}
