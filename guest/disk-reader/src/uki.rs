//! Unified kernel images (UAPI Group Specification UAPI.5): PE files with the kernel, its initrd and its command line
//! in sections.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use object::LittleEndian;
use object::pe::{IMAGE_FILE_MACHINE_AMD64, ImageDosHeader, ImageNtHeaders64, ImageSectionHeader};
use object::read::pe::ImageNtHeaders;

use crate::boot::{BootEntry, Candidate, Notes, Part, Rule, open_first};
use crate::command_line::MAX_COMMAND_LINE;
use crate::disk::{Disk, Location, insert_sorted};
use crate::entries::{BootOrder, Entry, LoaderSettings, is_absent};
use crate::partitions::PartitionType;

/// The directory for unified kernel images on the EFI system partition or the extended boot loader partition.
const DIRECTORY: &str = "/EFI/Linux";

/// How many bytes at the start of a file contain its headers. They have some hundred bytes.
const MAX_HEADERS: usize = 64 << 10;

/// The largest size of a section with text, in bytes. `.osrel` is a copy of os-release(5).
const MAX_TEXT: u64 = 64 << 10;

/// The largest number of images that are read. A partition has room for a few.
const MAX_IMAGES: usize = 256;

/// The content of a unified kernel image.
#[derive(Debug)]
struct Image {
    location: Location,
    order: BootOrder,
    linux: (u64, u64),
    initrd: Option<(u64, u64)>,
    command_line: String,
}

/// Finds the image that systemd-boot would boot. Returns `None` if its settings select one of `entries` instead.
pub(crate) fn find(disk: &Disk, entries: &[Entry], notes: &mut Notes) -> Option<BootEntry> {
    let mut images = Vec::new();
    for file_system in disk.boot_order() {
        let about = &disk.file_systems()[file_system];
        // Firmware and systemd-boot read no other file systems.
        if about.partition_type == PartitionType::Other && about.kind != "vfat" {
            continue;
        }
        collect(disk, file_system, &mut images, notes);
    }
    if images.is_empty() {
        return None;
    }
    let settings = LoaderSettings::read(disk);
    match images.iter().position(|image| settings.is_default(&image.order.id)) {
        Some(default) => images[..=default].rotate_right(1),
        None if entries.iter().any(|entry| settings.is_default(&entry.order.id)) => return None,
        None => {}
    }
    open_first(disk, images.into_iter().map(Candidate::from), notes)
}

fn collect(disk: &Disk, file_system: usize, images: &mut Vec<Image>, notes: &mut Notes) {
    let directory = Location::new(file_system, DIRECTORY);
    let names = match disk.list(&directory) {
        Ok(names) => names,
        Err(error) => {
            if !is_absent(&error) {
                notes.add(format!("{} {error}", disk.describe_location(&directory)));
            }
            return;
        }
    };
    let has_suffix = |name: &&String| name.to_ascii_lowercase().ends_with(".efi");
    for name in names.iter().filter(has_suffix) {
        if images.len() >= MAX_IMAGES {
            return;
        }
        let location = Location::new(file_system, format!("{DIRECTORY}/{name}"));
        match read(disk, &location) {
            Ok(image) => insert_sorted(images, image, |left, right| left.order.compare(&right.order)),
            Err(reason) => notes.add(format!("{} {reason}", disk.describe_location(&location))),
        }
    }
}

fn read(disk: &Disk, location: &Location) -> Result<Image, String> {
    let (file, size) = disk.open(location, u64::MAX).map_err(|error| error.to_string())?;
    let headers = disk.read_part(&file, MAX_HEADERS).map_err(|error| error.to_string())?;
    let sections = parse(&headers, size)?;
    let find = |name: &[u8]| sections.iter().find(|section| section.name == name).map(|it| it.range);
    let text = |name: &'static str, max: u64| {
        let Some(range) = find(name.as_bytes()) else {
            return Ok(String::new());
        };
        read_text(disk, &file, range, max).map_err(|reason| format!("has a section {name} that {reason}"))
    };
    let linux = find(b".linux").ok_or("is a program for EFI without a section .linux")?;
    let command_line = text(".cmdline", MAX_COMMAND_LINE as u64 + 1)?;
    let release = text(".osrel", MAX_TEXT)?;
    let first_field = |names: &[&str]| names.iter().find_map(|name| release_field(&release, name));
    Ok(Image {
        location: location.clone(),
        order: BootOrder {
            sort_key: first_field(&["IMAGE_ID", "ID"]),
            machine_id: String::new(),
            version: first_field(&["IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID"]).unwrap_or_default(),
            ..BootOrder::of_file(location.name())
        },
        linux,
        initrd: find(b".initrd"),
        command_line,
    })
}

fn read_text(disk: &Disk, mut file: &File, (offset, size): (u64, u64), max: u64) -> Result<String, String> {
    if size > max {
        return Err(format!("has {size} bytes, more than the limit of {max}"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|error| error.to_string())?;
    let size = usize::try_from(size).map_err(|error| error.to_string())?;
    let bytes = disk.read_part(file, size).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
}

/// Returns the value of a field of os-release(5).
fn release_field(release: &str, name: &str) -> Option<String> {
    let value = release
        .lines()
        .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// A section: its name, and its offset and length in the file.
#[derive(Debug, PartialEq, Eq)]
struct Section {
    name: Vec<u8>,
    range: (u64, u64),
}

/// Parses the headers of a PE file of `file_size` bytes. Returns the sections of its first profile, and those that all
/// profiles share.
fn parse(headers: &[u8], file_size: u64) -> Result<Vec<Section>, String> {
    let invalid = |error: object::Error| format!("is not a PE file: {error}");
    let dos_header = ImageDosHeader::parse(headers).map_err(invalid)?;
    let mut offset = dos_header.nt_headers_offset().into();
    let (nt_headers, _) = ImageNtHeaders64::parse(headers, &mut offset).map_err(invalid)?;
    if nt_headers.file_header().machine.get(LittleEndian) != IMAGE_FILE_MACHINE_AMD64 {
        return Err("is for another architecture than x86-64".to_owned());
    }
    let table = nt_headers.sections(headers, offset).map_err(invalid)?;
    let mut sections: Vec<Section> = Vec::new();
    let mut profiles = 0;
    for header in table.iter() {
        let section = section(header);
        if section.name == b".profile" {
            profiles += 1;
            // The sections after the second are for other profiles.
            if profiles > 1 {
                break;
            }
            continue;
        }
        let (offset, size) = section.range;
        if offset.checked_add(size).is_none_or(|end| end > file_size) {
            let name = String::from_utf8_lossy(&section.name);
            return Err(format!("is truncated: section {name} is not completely in the file"));
        }
        // A section of the profile replaces one that all profiles have.
        sections.retain(|earlier| profiles == 0 || earlier.name != section.name);
        sections.push(section);
    }
    Ok(sections)
}

fn section(header: &ImageSectionHeader) -> Section {
    let raw_size = header.size_of_raw_data.get(LittleEndian);
    // In the file, sections are padded to the alignment.
    let size = match header.virtual_size.get(LittleEndian) {
        0 => raw_size,
        size => size.min(raw_size),
    };
    let name = header.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Section {
        name: name.to_vec(),
        range: (header.pointer_to_raw_data.get(LittleEndian).into(), size.into()),
    }
}

impl From<Image> for Candidate {
    fn from(image: Image) -> Self {
        let part = |range| Part {
            location: image.location.clone(),
            range: Some(range),
        };
        Self {
            kernel: part(image.linux),
            initrds: image.initrd.map(part).into_iter().collect(),
            command_line: image.command_line,
            rule: Rule::UnifiedKernelImage,
            described_by: image.location,
        }
    }
}

/// Parses a whole file. Returns whether it is valid.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_parts(bytes: &[u8]) -> bool {
    release_field(&String::from_utf8_lossy(bytes), "ID");
    parse(bytes, bytes.len() as u64).is_ok()
}
