//! Tests of images that QEMU does not make: each is a valid image with a change.

use super::{Qcow2, Qcow2Error};
use crate::{Base, BaseError};

const CLUSTER: usize = 512;

/// Flags of entries.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Bytes at an offset of an image.
type Change = (usize, Vec<u8>);

/// An image of version 3 with 512-byte clusters and a disk of 64 KiB, which has two L2 tables. The first clusters of
/// the file are: header, two that are not used, L1 table, L2 table of the first half of the disk, data. The first
/// cluster of the disk is data, the rest is not allocated.
fn image() -> Vec<u8> {
    image_with_clusters_of(CLUSTER)
}

/// Returns the image of [`image`] with clusters of `size` bytes.
fn image_with_clusters_of(size: usize) -> Vec<u8> {
    let mut image = vec![0; 6 * size];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &size.ilog2().to_be_bytes());
    put(24, &(64_u64 << 10).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(3 * size as u64).to_be_bytes());
    put(100, &112_u32.to_be_bytes());
    put(3 * size, &((4 * size as u64) | COPIED).to_be_bytes());
    put(4 * size, &((5 * size as u64) | COPIED).to_be_bytes());
    put(5 * size, &vec![b'd'; size]);
    image
}

fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = image();
    for (offset, bytes) in changes {
        image[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

fn open(image: Vec<u8>) -> Result<Qcow2, Qcow2Error> {
    match Base::open(Box::new(image)) {
        Ok(Base::Qcow2(image)) => Ok(*image),
        Err(BaseError::Qcow2(error)) => Err(error),
        other => panic!("{other:?}"),
    }
}

/// Reads a cluster of the disk.
fn read(image: Vec<u8>, cluster: usize) -> Result<Vec<u8>, String> {
    let base = Base::Qcow2(Box::new(open(image).map_err(|error| error.to_string())?));
    let mut bytes = vec![0xee; CLUSTER];
    base.read(&mut &mut bytes[..], (cluster * CLUSTER) as u64, CLUSTER)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

#[test]
fn unchanged_image_reads_as_data_and_zeroes() {
    assert_eq!(read(image(), 0).unwrap(), [b'd'; CLUSTER]);
    assert_eq!(read(image(), 1).unwrap(), [0; CLUSTER]);
    assert_eq!(read(image(), 127).unwrap(), [0; CLUSTER]);
}

#[test]
fn header_that_is_invalid_or_not_supported_is_refused_with_field_and_value() {
    let name_of_bit_9: Vec<u8> = [
        &0x6803_f857_u32.to_be_bytes()[..],
        &48_u32.to_be_bytes(),
        &[0, 9],
        b"shiny\x1b[0m",
        &[0; 37],
    ]
    .concat();
    let u32s = |offset: usize, value: u32| (offset, value.to_be_bytes().to_vec());
    let u64s = |offset: usize, value: u64| (offset, value.to_be_bytes().to_vec());
    let cases: Vec<(Vec<Change>, &str)> = vec![
        (vec![u32s(4, 1)], "version is 1, "),
        (vec![u32s(4, 4)], "version is 4, "),
        (vec![u64s(8, 300), u32s(16, 0)], "it has the backing file \"\":"),
        (
            vec![u64s(8, 300), u32s(16, 3), (300, b"/b\n".to_vec())],
            "it has the backing file \"/b\\n\":",
        ),
        (
            vec![u64s(8, u64::MAX), u32s(16, u32::MAX)],
            "it has the backing file \"\":",
        ),
        (vec![u32s(20, 8)], "cluster_bits is 8, "),
        (vec![u32s(20, 22)], "cluster_bits is 22, "),
        (vec![u32s(20, u32::MAX)], "cluster_bits is 4294967295, "),
        (vec![u64s(24, 0)], "size is 0, the disk is empty"),
        (vec![u64s(24, 65537)], "size is 65537, not a multiple of 512"),
        (
            vec![u64s(24, u64::MAX - 511)],
            "size is 18446744073709551104, more than the maximum of 8 TiB",
        ),
        (
            vec![u64s(24, 8 << 40)],
            "size is 8796093022208, more than the maximum for this size of clusters",
        ),
        (vec![u64s(24, 1 << 20)], "l1_size is 2, less than the disk needs"),
        (vec![u32s(32, 1)], "it is encrypted (crypt_method 1, AES)"),
        (vec![u32s(32, 2)], "it is encrypted (crypt_method 2, LUKS)"),
        (vec![u32s(32, 7)], "it is encrypted (crypt_method 7, unknown)"),
        (vec![u32s(36, 1)], "l1_size is 1, "),
        (vec![u64s(40, 0)], "l1_table_offset is 0, "),
        (vec![u64s(40, 1537)], "l1_table_offset is 1537, "),
        (
            vec![u64s(40, 1 << 50)],
            "the file is truncated: it has 3072 bytes, and the L1 table is at byte 1125899906842624",
        ),
        (
            vec![u64s(40, u64::MAX - 511)],
            "the file is truncated: it has 3072 bytes, and the L1 table is at byte",
        ),
        (vec![u64s(72, 1)], "incompatible feature bit 0, \"dirty bit\""),
        (vec![u64s(72, 2)], "incompatible feature bit 1, \"corrupt bit\""),
        (vec![u64s(72, 4)], "incompatible feature bit 2, \"external data file\""),
        (
            vec![u64s(72, 8)],
            "compression_type is 0, which contradicts incompatible feature bit 3",
        ),
        (
            vec![(104, vec![1])],
            "compression_type is 1, which contradicts incompatible feature bit 3",
        ),
        (
            vec![u64s(72, 8), (104, vec![2])],
            "compression_type is 2, which contradicts incompatible feature bit 3, or is",
        ),
        (vec![u64s(72, 16)], "extended L2 entries (incompatible feature bit 4)"),
        (vec![u64s(72, 1 << 9)], "unknown incompatible feature bit 9"),
        (
            vec![u64s(72, 1 << 9), (112, name_of_bit_9)],
            "unknown incompatible feature bit 9, \"shiny\\x1b[0m\"",
        ),
        (
            vec![u64s(72, 1 << 63), u64s(112, u64::MAX)],
            "unknown incompatible feature bit 63",
        ),
        (vec![u32s(100, 100)], "header_length is 100, "),
        (vec![u32s(100, 105)], "header_length is 105, "),
        (vec![u32s(100, 1024)], "header_length is 1024, "),
        (vec![u32s(100, u32::MAX)], "header_length is 4294967295, "),
        (
            vec![u64s(3 * CLUSTER + 8, 1 << 40)],
            "and an L2 table is at byte 1099511627776",
        ),
        (
            vec![u64s(4 * CLUSTER + 8, 1 << 40)],
            "and a cluster is at byte 1099511627776",
        ),
    ];
    for (changes, expected) in cases {
        let changes: Vec<(usize, &[u8])> = changes.iter().map(|(offset, bytes)| (*offset, &bytes[..])).collect();
        let error = match open(with(&changes)) {
            Ok(_) => panic!("{expected}: not refused"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(expected), "{error}\ninstead of\n{expected}");
    }
}

/// A guest that can write the header of an image must not read a file of the host by it.
#[test]
fn image_that_names_another_file_is_refused_ghsa_jmr4_g2hv_mjj6() {
    const PATH: &[u8] = b"/etc/hostname";
    let length = u32::try_from(PATH.len()).unwrap().to_be_bytes();
    for version in [2_u32, 3] {
        let changes: [(usize, &[u8]); 4] = [
            (4, &version.to_be_bytes()),
            (8, &300_u64.to_be_bytes()),
            (16, &length),
            (300, PATH),
        ];
        let error = open(with(&changes)).unwrap_err().to_string();
        assert!(error.contains("it has the backing file \"/etc/hostname\""), "{error}");
    }
    let error = open(with(&[(72, &4_u64.to_be_bytes())])).unwrap_err().to_string();
    assert!(error.contains("its data is in another file"), "{error}");
}

/// The guest of a raw disk has written the header of a qcow2 image to it.
#[test]
fn raw_disk_stays_raw_whatever_its_content_is_ghsa_jmr4_g2hv_mjj6() {
    let content = with(&[(8, &300_u64.to_be_bytes()), (16, &[0, 0, 0, 1]), (300, b"/")]);
    let base = Base::open_raw(Box::new(content.clone())).unwrap();
    let mut read = vec![0; content.len()];
    base.read(&mut &mut read[..], 0, content.len()).unwrap();
    assert_eq!(read, content);
}

#[test]
fn version_2_has_neither_features_nor_zero_clusters() {
    // What is a feature bit in version 3 has no meaning in version 2.
    let version_2 = (4, &2_u32.to_be_bytes()[..]);
    let features = (72, &[0xff; 24][..]);
    let data = read(with(&[version_2, features]), 0).unwrap();
    assert_eq!(data, [b'd'; CLUSTER]);
    let zero_cluster = (4 * CLUSTER, &1_u64.to_be_bytes()[..]);
    assert_eq!(read(with(&[zero_cluster]), 0).unwrap(), [0; CLUSTER]);
    let error = read(with(&[version_2, zero_cluster]), 0).unwrap_err();
    assert!(
        error.starts_with("entry 0 of the L2 table is 0x1, a zero cluster"),
        "{error}"
    );
}

#[test]
fn zero_flag_hides_the_data_of_a_cluster() {
    let entry = ((5 * CLUSTER as u64) | COPIED | 1).to_be_bytes();
    assert_eq!(read(with(&[(4 * CLUSTER, &entry)]), 0).unwrap(), [0; CLUSTER]);
}

#[test]
fn entry_that_points_past_the_end_of_the_file_is_refused() {
    let compressed = COMPRESSED | (1 << 40);
    for (entry, expected) in [
        (5 * 512 + 0x400, "it has 3072 bytes, and a cluster is at byte 3584"),
        (0x00ff_ffff_ffff_fe00, "and a cluster is at byte 72057594037927424"),
        (compressed, "and a compressed cluster is at byte 1099511627776"),
    ] {
        let error = open(with(&[(4 * CLUSTER + 8, &u64::to_be_bytes(entry))])).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("the file is truncated") && error.contains(expected),
            "{error}"
        );
    }
}

#[test]
fn invalid_entry_after_those_that_are_checked_fails_the_read_of_its_cluster_only() {
    // A disk of 1 GiB, whose L1 table comes after the other parts. Its last entry names an L2 table after that.
    let (l1_entries, l1_offset) = (32768, 6 * CLUSTER);
    let l2_offset = (l1_offset + l1_entries * 8) as u64;
    let mut image = with(&[
        (24, &(1_u64 << 30).to_be_bytes()),
        (36, &32768_u32.to_be_bytes()),
        (40, &(l1_offset as u64).to_be_bytes()),
    ]);
    image.extend((4 * CLUSTER as u64).to_be_bytes());
    image.extend(vec![0; (l1_entries - 2) * 8]);
    image.extend(l2_offset.to_be_bytes());
    image.extend((1_u64 << 40).to_be_bytes());
    image.extend(vec![0; CLUSTER - 8]);
    let cluster = (1 << 30) / CLUSTER - 64;

    let error = read(image.clone(), cluster).unwrap_err();

    assert!(error.contains("and a cluster is at byte 1099511627776"), "{error}");
    assert_eq!(read(image.clone(), cluster + 1).unwrap(), [0; CLUSTER]);
    assert_eq!(read(image.clone(), 0).unwrap(), [b'd'; CLUSTER]);
    assert_eq!(open(image).unwrap().survey().unwrap_err().to_string(), error);
}

#[test]
fn compressed_cluster_without_valid_data_fails_the_read_of_its_cluster_only() {
    for (position, sectors) in [(5 * 512, 0), (5 * 512 + 500, 1), (6 * 512 - 1, 1)] {
        let entry = COMPRESSED | (sectors << 61) | position;
        let image = with(&[(4 * CLUSTER + 8, &u64::to_be_bytes(entry))]);
        let error = read(image.clone(), 1).unwrap_err();
        let expected = format!("guest cluster 1, zlib data at byte {position}, cannot be decompressed: ");
        assert!(error.starts_with(&expected), "{error}");
        assert_eq!(read(image, 0).unwrap(), [b'd'; CLUSTER]);
    }
}

#[test]
fn compressed_cluster_must_have_exactly_the_size_of_a_cluster() {
    // Stored blocks of deflate: final block flag, length, its complement, data.
    let stored = |length: u16| {
        let mut data = vec![1];
        data.extend(length.to_le_bytes());
        data.extend((!length).to_le_bytes());
        data.extend(vec![b'c'; length.into()]);
        data
    };
    let entry = (COMPRESSED | (1 << 61) | (6 * 512)).to_be_bytes();
    for (length, expected) in [
        (512, None),
        (511, Some("it has 511 bytes instead of 512")),
        (513, Some("it has more than 512 bytes")),
        (0, Some("it has 0 bytes instead of 512")),
    ] {
        let mut image = with(&[(4 * CLUSTER, &entry)]);
        image.extend(stored(length));
        match (read(image, 0), expected) {
            (Ok(bytes), None) => assert_eq!(bytes, [b'c'; CLUSTER]),
            (Err(error), Some(expected)) => assert!(error.ends_with(expected), "{error}"),
            (result, _) => panic!("{length}: {result:?}"),
        }
    }
}

#[test]
fn zstd_frame_that_demands_much_memory_or_output_is_refused() {
    let zstd = [(72, &8_u64.to_be_bytes()[..]), (104, &[1][..])];
    let entry = (COMPRESSED | (1 << 61) | (6 * 512)).to_be_bytes();
    let frame = |window: u8, blocks: &[&[u8]]| [&[0x28, 0xb5, 0x2f, 0xfd, 0, window][..], &blocks.concat()].concat();
    // Blocks of one repeated byte: last-block flag, type 1, number of bytes, byte.
    let repeat = |count: u32, last: u32| {
        let [b0, b1, b2, _] = ((count << 3) | (1 << 1) | last).to_le_bytes();
        [b0, b1, b2, b'z']
    };
    let many: Vec<[u8; 4]> = vec![repeat(128 << 10, 0); 200];
    let many: Vec<&[u8]> = many.iter().map(|block| &block[..]).collect();
    for (data, expected) in [
        (frame(0, &[&repeat(512, 1)]), None),
        (frame(0, &[&repeat(256, 0), &repeat(256, 1)]), None),
        (
            [frame(0, &[&repeat(256, 1)]), frame(0, &[&repeat(256, 1)])].concat(),
            None,
        ),
        (frame(0, &[&repeat(513, 1)]), Some("it has more than 512 bytes")),
        (frame(7 << 3, &many), Some("it has more than 512 bytes")),
        (frame(0, &[&repeat(511, 1)]), Some("it has 511 bytes instead of 512")),
        (frame(0xff, &[&repeat(512, 1)]), Some("cannot be decompressed: ")),
        (frame(14 << 3, &[&repeat(512, 1)]), Some("cannot be decompressed: ")),
        (vec![0; 64], Some("cannot be decompressed: ")),
    ] {
        let mut image = with(&[zstd[0], zstd[1], (4 * CLUSTER, &entry)]);
        image.extend(data);
        match (read(image, 0), expected) {
            (Ok(bytes), None) => assert_eq!(bytes, [b'z'; CLUSTER]),
            (Err(error), Some(expected)) => assert!(error.contains(expected), "{error}"),
            (result, _) => panic!("{expected:?}: {result:?}"),
        }
    }
}

#[test]
fn table_entry_that_is_not_aligned_is_refused() {
    let mut image = image_with_clusters_of(1024);
    image[3 * 1024..][..8].copy_from_slice(&0x1200_u64.to_be_bytes());
    let error = open(image).unwrap_err().to_string();
    assert_eq!(error, "entry 0 of the L1 table is 0x1200, not the start of a cluster");

    let mut image = image_with_clusters_of(1024);
    image[4 * 1024..][..8].copy_from_slice(&0x1200_u64.to_be_bytes());
    let error = read(image, 0).unwrap_err();
    assert_eq!(error, "entry 0 of the L2 table is 0x1200, not the start of a cluster");
}
