//! Disks for tests, with directories in place of mounted file systems, and assertions about what is found on them.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nutshell_disk_reader::{BootEntry, Disk, FileSystem, MAX_ERROR_LENGTH, PartitionType, find_kernel};
use tempfile::TempDir;

/// A file in a test.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Content<'c> {
    /// A file in `tests/fixtures`.
    Fixture(&'c str),
    Text(&'c str),
    Bytes(&'c [u8]),
    /// A file whose content does not matter, such as a kernel.
    Any,
    Empty,
    /// A file with a size and no blocks.
    Sparse(u64),
    Link(&'c str),
    Fifo,
    Directory,
}

/// A file system in a test. If its type is vfat, its partition is the EFI system partition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree<'t> {
    pub(crate) name: &'t str,
    pub(crate) kind: &'t str,
    pub(crate) uuid: &'t str,
    pub(crate) label: &'t str,
    pub(crate) files: &'t [(&'t str, Content<'t>)],
}

/// A disk whose file systems are directories.
#[derive(Debug)]
pub(crate) struct TestDisk {
    pub(crate) disk: Disk,
    _directories: Vec<TempDir>,
}

pub(crate) type Files<'f> = &'f [(&'f str, Content<'f>)];

pub(crate) fn tree<'t>(name: &'t str, kind: &'t str, uuid: &'t str, files: Files<'t>) -> Tree<'t> {
    Tree {
        name,
        kind,
        uuid,
        label: "",
        files,
    }
}

/// Describes an entry on three lines: kernel and initrds, command line, source.
pub(crate) fn describe(disk: &Disk, entry: &BootEntry) -> [String; 3] {
    let files = [&entry.kernel].into_iter().chain(&entry.initrds);
    let name = |at: usize| disk.file_systems()[at].name.clone();
    let files: Vec<_> = files
        .map(|file| format!("{}:{}", name(file.file_system), file.path))
        .collect();
    [files.join(" "), entry.command_line.clone(), entry.source.to_string()]
}

pub(crate) fn assert_found(name: &str, trees: &[Tree<'_>], expected: [&str; 3]) {
    let test = build(trees);
    match find_kernel(&test.disk) {
        Ok(entry) => assert_eq!(describe(&test.disk, &entry), expected, "{name}"),
        Err(error) => panic!("{name}: {error}"),
    }
}

pub(crate) fn assert_not_found(name: &str, trees: &[Tree<'_>], parts: &[&str]) {
    let test = build(trees);
    let error = find_kernel(&test.disk).expect_err(name).to_string();
    for part in parts {
        assert!(error.contains(part), "{name}: {part:?} is not in {error:?}");
    }
    let is_one_line = error.chars().all(|character| matches!(character, ' '..='~'));
    assert!(is_one_line && error.len() <= MAX_ERROR_LENGTH, "{name}: {error:?}");
}

pub(crate) fn build(trees: &[Tree<'_>]) -> TestDisk {
    build_until(trees, Instant::now() + Duration::from_secs(60))
}

pub(crate) fn build_until(trees: &[Tree<'_>], deadline: Instant) -> TestDisk {
    let mut directories = Vec::new();
    let mut file_systems = Vec::new();
    for tree in trees {
        let directory = TempDir::new().unwrap();
        for (path, content) in tree.files {
            create(&directory.path().join(path.trim_start_matches('/')), *content);
        }
        let optional = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        file_systems.push(FileSystem {
            name: tree.name.to_owned(),
            number: tree.name.trim_start_matches("vda").parse().ok(),
            partition_type: match tree.kind {
                "vfat" => PartitionType::EfiSystem,
                _ => PartitionType::Other,
            },
            partition_label: None,
            kind: tree.kind.to_owned(),
            uuid: optional(tree.uuid),
            label: optional(tree.label),
            root: OwnedFd::from(fs::File::open(directory.path()).unwrap()),
        });
        directories.push(directory);
    }
    TestDisk {
        disk: Disk::new(file_systems, deadline),
        _directories: directories,
    }
}

fn create(path: &Path, content: Content<'_>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    match content {
        Content::Fixture(name) => {
            fs::copy(
                Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name),
                path,
            )
            .unwrap();
        }
        Content::Text(text) => fs::write(path, text).unwrap(),
        Content::Bytes(bytes) => fs::write(path, bytes).unwrap(),
        Content::Any => fs::write(path, "content").unwrap(),
        Content::Empty => fs::write(path, "").unwrap(),
        Content::Sparse(size) => fs::File::create(path).unwrap().set_len(size).unwrap(),
        Content::Link(target) => std::os::unix::fs::symlink(target, path).unwrap(),
        Content::Fifo => rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RUSR).unwrap(),
        Content::Directory => fs::create_dir(path).unwrap(),
    }
}

/// Builds a unified kernel image: a PE file with `sections`.
pub(crate) fn image(sections: &[(&str, &[u8])]) -> Vec<u8> {
    const HEADERS: u32 = 0x1000;
    let mut bytes = vec![0_u8; 0x80];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x3c..0x40].copy_from_slice(&0x80_u32.to_le_bytes());
    bytes.extend(b"PE\0\0");
    // The file header: x86-64, and an optional header without data directories.
    bytes.extend(0x8664_u16.to_le_bytes());
    bytes.extend(u16::try_from(sections.len()).unwrap().to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend(112_u16.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(0x20b_u16.to_le_bytes());
    bytes.extend([0; 110]);
    let mut at = HEADERS;
    let mut contents = Vec::new();
    for (name, content) in sections {
        let mut padded_name = [0; 8];
        padded_name[..name.len()].copy_from_slice(name.as_bytes());
        let size = u32::try_from(content.len()).unwrap();
        let padded_size = size.next_multiple_of(512);
        bytes.extend(padded_name);
        for value in [size, at, padded_size, at] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([0; 16]);
        contents.extend(*content);
        contents.resize((at + padded_size - HEADERS) as usize, 0);
        at += padded_size;
    }
    bytes.resize(HEADERS as usize, 0);
    bytes.extend(contents);
    bytes
}
