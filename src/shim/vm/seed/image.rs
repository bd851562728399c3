//! Writes the image of a small FAT12 file system into a sealed memfd. Sections are those of Microsoft's "FAT: General
//! Overview of On-Disk Format", version 1.03, unless they name another document.

use std::{
    fs::File,
    io::{self, Write},
    iter,
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sha2::{Digest, Sha256};

/// In bytes.
const SECTOR_SIZE: u16 = 512;
/// With this size, four files of 1 MiB need half of the clusters that FAT12 can have.
const SECTORS_PER_CLUSTER: u8 = 4;
/// In bytes.
const CLUSTER_SIZE: usize = SECTORS_PER_CLUSTER as usize * SECTOR_SIZE as usize;
/// A file system with more clusters is not FAT12: the number of clusters decides the type ("FAT Type Determination").
const MAX_CLUSTERS: u16 = 4084;
/// The number of the first cluster. The entries of the table before it are reserved.
const FIRST_CLUSTER: u16 = 2;
const END_OF_CHAIN: u16 = 0xfff;
const TABLE_COPIES: u8 = 2;
/// The media descriptor of a fixed disk.
const MEDIA: u8 = 0xf8;
/// The size of the image, in bytes, is a multiple of this, so that a block device of it has whole pages.
const ALIGNMENT: usize = 4096;

/// The size of an entry of a directory, in bytes.
const ENTRY_SIZE: usize = 32;
const VOLUME_LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const ARCHIVE: u8 = 0x20;
/// The attributes of entries with a part of a long name.
const LONG_NAME: u8 = 0x0f;
/// Characters of a long name in one entry, and their offsets.
const LONG_NAME_PART: usize = 13;
const LONG_NAME_OFFSETS: [usize; LONG_NAME_PART] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
/// The first day that FAT can express, 1980-01-01.
const DATE: u16 = 1 << 5 | 1;

/// A label, padded with spaces.
pub(super) type Label = [u8; 11];

/// A file system. All its files are in one folder.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) label: Label,
    /// The path of the folder, from the top down. Empty for the root directory.
    pub(super) folder: &'static [&'static str],
    /// Names and bytes. Names are ASCII, have at most 255 bytes, and do not differ only in case.
    pub(super) files: Vec<(String, Vec<u8>)>,
}

/// Writes the image. It contains no time and no random number: equal contents result in equal images.
pub(super) fn write(contents: &Contents) -> io::Result<File> {
    let mut data = Data::new();
    let mut entries = Vec::new();
    for (index, (name, bytes)) in contents.files.iter().enumerate() {
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let first = if bytes.is_empty() { 0 } else { data.append(bytes)? };
        entries.extend(named_entry(name, index, ARCHIVE, first, size));
    }
    for (depth, name) in contents.folder.iter().enumerate().rev() {
        let own = data.end;
        // The next iteration writes the parent, directly behind this directory. 0 means the root directory.
        let parent = match depth {
            0 => 0,
            _ => data.end_after(2 * ENTRY_SIZE + entries.len())?,
        };
        let mut folder = Vec::new();
        folder.extend(entry(b".          ", DIRECTORY, own, 0));
        folder.extend(entry(b"..         ", DIRECTORY, parent, 0));
        folder.append(&mut entries);
        data.append(&folder)?;
        entries = named_entry(name, 0, DIRECTORY, own, 0);
    }
    let mut root = entry(&contents.label, VOLUME_LABEL, 0, 0).to_vec();
    root.append(&mut entries);
    pad(&mut root, usize::from(SECTOR_SIZE));

    data.add_free_cluster_if_empty();
    let table = data.pack_table();
    let mut image = boot_sector(contents, &root, &table, &data)?.to_vec();
    for _ in 0..TABLE_COPIES {
        image.extend(&table);
    }
    image.append(&mut root);
    image.append(&mut data.bytes);
    pad(&mut image, ALIGNMENT);
    seal(&image)
}

/// The clusters and their table.
#[derive(Debug)]
struct Data {
    bytes: Vec<u8>,
    /// For each cluster, the next one of the same file.
    next: Vec<u16>,
    /// The first free cluster.
    end: u16,
}

impl Data {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            next: Vec::new(),
            end: FIRST_CLUSTER,
        }
    }

    /// The first cluster that is free after `size` bytes are appended.
    fn end_after(&self, size: usize) -> io::Result<u16> {
        let clusters = u16::try_from(size.div_ceil(CLUSTER_SIZE)).ok();
        clusters
            .and_then(|clusters| self.end.checked_add(clusters))
            .filter(|end| *end <= FIRST_CLUSTER + MAX_CLUSTERS)
            .ok_or_else(|| io::ErrorKind::FileTooLarge.into())
    }

    /// Appends a file or directory, which is not empty, and returns its first cluster.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u16> {
        let (first, end) = (self.end, self.end_after(bytes.len())?);
        self.bytes.extend_from_slice(bytes);
        pad(&mut self.bytes, CLUSTER_SIZE);
        self.next.extend(first + 1..end);
        self.next.push(END_OF_CHAIN);
        self.end = end;
        Ok(first)
    }

    /// A file system has at least one cluster.
    fn add_free_cluster_if_empty(&mut self) {
        if self.next.is_empty() {
            self.bytes.resize(CLUSTER_SIZE, 0);
            self.next.push(0);
        }
    }

    /// The table, whose entries have 12 bits, in whole sectors.
    fn pack_table(&self) -> Vec<u8> {
        let reserved = [0xf00 | u16::from(MEDIA), END_OF_CHAIN];
        let entries: Vec<u16> = reserved.into_iter().chain(self.next.iter().copied()).collect();
        let mut table = Vec::new();
        for pair in entries.chunks(2) {
            let second = pair.get(1).copied().unwrap_or(0);
            let pair = u32::from(pair[0]) | u32::from(second) << 12;
            table.extend_from_slice(&pair.to_le_bytes()[..3]);
        }
        pad(&mut table, usize::from(SECTOR_SIZE));
        table
    }
}

/// Pads `bytes` with zeros to a multiple of `unit`.
fn pad(bytes: &mut Vec<u8>, unit: usize) {
    bytes.resize(bytes.len().next_multiple_of(unit), 0);
}

/// The boot sector ("Boot Sector and BPB Structure"). `table` is one copy of the table.
fn boot_sector(contents: &Contents, root: &[u8], table: &[u8], data: &Data) -> io::Result<[u8; SECTOR_SIZE as usize]> {
    let in_units = |size: usize, unit: usize| u16::try_from(size / unit).map_err(io::Error::other);
    let sectors = |size: usize| in_units(size, usize::from(SECTOR_SIZE));
    let total = usize::from(SECTOR_SIZE) + usize::from(TABLE_COPIES) * table.len() + root.len() + data.bytes.len();

    let mut sector = [0; SECTOR_SIZE as usize];
    let mut put = |offset: usize, bytes: &[u8]| sector[offset..offset + bytes.len()].copy_from_slice(bytes);
    // A jump over the parameters. No code follows.
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"NUTSHELL");
    put(11, &SECTOR_SIZE.to_le_bytes());
    put(13, &[SECTORS_PER_CLUSTER]);
    // Reserved sectors: this one.
    put(14, &1u16.to_le_bytes());
    put(16, &[TABLE_COPIES]);
    put(17, &in_units(root.len(), ENTRY_SIZE)?.to_le_bytes());
    put(19, &sectors(total)?.to_le_bytes());
    put(21, &[MEDIA]);
    put(22, &sectors(table.len())?.to_le_bytes());
    // Sectors per track and heads, which only a BIOS uses.
    put(24, &32u16.to_le_bytes());
    put(26, &64u16.to_le_bytes());
    put(36, &[0x80]);
    // The signature of the next three fields.
    put(38, &[0x29]);
    put(39, &serial_number(contents));
    put(43, &contents.label);
    put(54, b"FAT12   ");
    put(510, &[0x55, 0xaa]);
    Ok(sector)
}

/// The serial number of the volume. It depends on the contents, so that the file systems of a guest have different
/// numbers.
fn serial_number(contents: &Contents) -> [u8; 4] {
    let mut hash = Sha256::new();
    hash.update(contents.label);
    for (name, bytes) in &contents.files {
        hash.update(name);
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    }
    let [a, b, c, d, ..] = <[u8; 32]>::from(hash.finalize());
    [a, b, c, d]
}

/// The entries of a file or folder: its long name, and a short name that is unique in its folder: its `index`.
fn named_entry(name: &str, index: usize, attributes: u8, first_cluster: u16, size: u32) -> Vec<u8> {
    let mut short_name = [b' '; 11];
    short_name[..8].copy_from_slice(format!("{index:08}").as_bytes());
    let checksum = short_name
        .iter()
        .fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));

    let mut bytes = Vec::new();
    let parts: Vec<(u8, &[u8])> = (1..).zip(name.as_bytes().chunks(LONG_NAME_PART)).collect();
    // The last part comes first, and has a mark ("FAT Long Directory Entries").
    let mut mark = 0x40;
    for (number, part) in parts.into_iter().rev() {
        let mut entry = [0; ENTRY_SIZE];
        entry[0] = mark | number;
        entry[11] = LONG_NAME;
        entry[13] = checksum;
        // A zero ends a name that does not fill its last part; 0xffff follows.
        let padding = iter::once(0).chain(iter::repeat(0xffff));
        let characters = part.iter().copied().map(u16::from).chain(padding);
        for (offset, character) in LONG_NAME_OFFSETS.into_iter().zip(characters) {
            entry[offset..offset + 2].copy_from_slice(&character.to_le_bytes());
        }
        bytes.extend(entry);
        mark = 0;
    }
    bytes.extend(entry(&short_name, attributes, first_cluster, size));
    bytes
}

/// An entry with a short name ("FAT Directory Structure").
fn entry(name: &[u8; 11], attributes: u8, first_cluster: u16, size: u32) -> [u8; ENTRY_SIZE] {
    let mut entry = [0; ENTRY_SIZE];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    // Creation, last access, last write. The times are midnight.
    for offset in [16, 18, 24] {
        entry[offset..offset + 2].copy_from_slice(&DATE.to_le_bytes());
    }
    entry[26..28].copy_from_slice(&first_cluster.to_le_bytes());
    entry[28..].copy_from_slice(&size.to_le_bytes());
    entry
}

fn seal(image: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("seed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(image)?;
    fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(file)
}
