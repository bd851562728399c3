//! The entry points of the fuzz targets for disks.
//!
//! Belongs here: functions that pass the bytes of an input to the parsers of this crate, and panic if these break their
//! contract. Does not belong here: anything that the agent needs. The targets in `fuzz/fuzz_targets` call these
//! functions, and so do the tests, with the stored inputs.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{
    cmp::Ordering,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    Disk, FileSystem, MAX_COMMAND_LINE, MAX_ERROR_LENGTH, MAX_INITRDS, PartitionType, START_SIZE, command_line,
    disk::Location, entries, extlinux, find_kernel, grub, identify, newest, partition_types, pattern, uki, version,
};

/// Starts a line with the path of a file. The lines after it are the content of the file.
const FILE_MARK: &str = "@@ ";

/// The maximum number of files of a disk.
const MAX_FILES: usize = 16;

/// The time limit of a search. No input may reach it.
const LIMIT: Duration = Duration::from_secs(20);

/// Searches for the kernel on a disk with the files that `data` describes: each starts with a line `@@ PATH`.
///
/// # Panics
///
/// If the kernel that is found has too many initrds, or a text is too long or has control characters.
pub fn search_disk(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::<(&str, String)>::new();
    for line in text.split_inclusive('\n') {
        match line.strip_prefix(FILE_MARK) {
            Some(path) if files.len() < MAX_FILES => files.push((path.trim_end_matches('\n'), String::new())),
            _ => files.iter_mut().rev().take(1).for_each(|file| file.1.push_str(line)),
        }
    }
    for (path, content) in &files {
        parse_text(content);
        create_file(folder.path(), path, content);
    }
    let file_system = FileSystem {
        name: "vda1".to_owned(),
        number: Some(1),
        partition_type: PartitionType::EfiSystem,
        partition_label: None,
        kind: "ext4".to_owned(),
        uuid: Some("0f6b2f0e-7a54-4b9c-9a35-1f2d3c4b5a69".to_owned()),
        label: None,
        root: fs::File::open(folder.path()).unwrap().into(),
    };
    match find_kernel(&Disk::new(vec![file_system], Instant::now() + LIMIT)) {
        Ok(entry) => {
            assert!(entry.initrds.len() <= MAX_INITRDS);
            assert!(entry.command_line.len() <= MAX_COMMAND_LINE);
            assert!(!entry.command_line.chars().any(char::is_control));
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() <= MAX_ERROR_LENGTH && !text.chars().any(char::is_control));
        }
    }
}

/// Creates a file in `folder`, if each part of its path is a plain file name.
fn create_file(folder: &Path, path: &str, content: &str) {
    let is_name = |name: &str| {
        let is_valid = |byte| u8::is_ascii_alphanumeric(&byte) || b"-_.+~^".contains(&byte);
        !name.starts_with('.') && name.len() < 64 && name.bytes().all(is_valid)
    };
    let parts: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
    if parts.is_empty() || parts.len() > 8 || !parts.iter().all(|name| is_name(name)) {
        return;
    }
    let path = folder.join(parts.join("/"));
    // Fails if another file is in place of a directory.
    if fs::create_dir_all(path.parent().unwrap()).is_ok() {
        let _ = fs::write(path, content);
    }
}

/// Passes a text to each parser of texts.
fn parse_text(text: &str) {
    let location = Location::new(0, "/boot/loader/entries/a.conf");
    // An error only says that the text is invalid.
    let _ = grub::parse_parts(text);
    let _ = entries::parse_parts(text, &location);
    extlinux::parse_parts(text, &location);
    newest::parse_parts(text);
    let _ = command_line::clean(text);
}

/// Parses `data` as a unified kernel image.
pub fn parse_kernel_image(data: &[u8]) {
    let _ = uki::parse_parts(data);
}

/// Identifies a file system and partitions. `data` has parts of the start of a disk: each is an offset of three bytes,
/// a length of one byte, and the bytes. The rest is zero.
///
/// # Panics
///
/// If a UUID is longer than 64 bytes.
pub fn identify_disk(mut data: &[u8]) {
    let mut start = vec![0; START_SIZE];
    while let Some(([a, b, c, length], rest)) = data.split_first_chunk::<4>() {
        let (part, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        let offset = usize::try_from(u32::from_le_bytes([*a, *b, *c, 0])).unwrap() % START_SIZE;
        let end = (offset + part.len()).min(START_SIZE);
        start[offset..end].copy_from_slice(&part[..end - offset]);
        data = rest;
    }
    for start in [&start[..], &start[..START_SIZE / 2]] {
        if let Some(superblock) = identify(start) {
            assert!(superblock.uuid.iter().all(|uuid| uuid.len() <= 64), "{superblock:?}");
        }
        for block_size in [0, 1, 512, 4096, usize::MAX] {
            let _ = partition_types(start, block_size);
        }
    }
}

/// Compares the three lines of `data` as versions, and as pattern and name.
///
/// # Panics
///
/// If the comparisons of versions contradict each other.
pub fn compare_names(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.splitn(3, '\n');
    let [a, b, c] = [(); 3].map(|()| lines.next().unwrap_or(""));
    for (left, right) in [(a, b), (b, c), (a, c), (a, a)] {
        let order = version::compare(left, right);
        assert_eq!(version::compare(right, left), order.reverse(), "{left:?} {right:?}");
        pattern::is_match(left, right);
        assert!(pattern::is_match("*", right));
    }
    assert_eq!(version::compare(a, a), Ordering::Equal);
    let mut sorted = [a, b, c];
    sorted.sort_by(|left, right| version::compare(left, right));
    let [first, second, third] = sorted;
    assert_ne!(version::compare(first, third), Ordering::Greater, "{sorted:?}");
    if version::compare(first, second).is_lt() || version::compare(second, third).is_lt() {
        assert_eq!(version::compare(first, third), Ordering::Less, "{sorted:?}");
    }
}

#[cfg(test)]
mod tests {
    use nutshell_fixtures::replay_corpus;

    #[test]
    fn kernels_on_stored_disks_are_found_or_refused() {
        replay_corpus("boot_loaders", super::search_disk);
    }

    #[test]
    fn stored_kernel_images_are_parsed_or_refused() {
        replay_corpus("unified_kernel", super::parse_kernel_image);
    }

    #[test]
    fn stored_superblocks_and_partition_tables_are_identified_or_refused() {
        replay_corpus("superblock", super::identify_disk);
    }

    #[test]
    fn versions_in_stored_names_have_an_order() {
        replay_corpus("names", super::compare_names);
    }
}
