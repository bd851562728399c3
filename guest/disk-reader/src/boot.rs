//! The types that all rules use: what a rule proposes, what is found, and notes about what cannot be booted.

use std::fmt;
use std::fs::File;

use crate::command_line;
use crate::disk::{Disk, Location};

/// The largest size of a kernel, in bytes. Kernels of distributions have 5 to 20 MiB, unified kernel images more.
pub const MAX_KERNEL_SIZE: u64 = 256 << 20;

/// The largest total size of the initrds of an entry, in bytes. Those of live systems have some hundred megabytes.
pub const MAX_INITRD_SIZE: u64 = 1 << 30;

/// The largest number of initrds of an entry. Entries have one, and one or two for microcode.
pub const MAX_INITRDS: usize = 16;

/// The largest number of notes. More would not fit into an error text.
const MAX_NOTES: usize = 16;

/// The largest length of a note, in bytes.
const MAX_NOTE: usize = 320;

/// How many entries of a menu are tried: the default first, then the others in order.
pub(crate) const MAX_TRIED_ENTRIES: usize = 32;

/// What the boot loader of a disk boots.
#[derive(Debug)]
pub struct BootEntry {
    /// The kernel, in the format of the file: a bzImage as a rule.
    pub kernel: BootFile,
    /// The initrds, which the kernel gets one after the other.
    pub initrds: Vec<BootFile>,
    /// The kernel's command line: printable ASCII, at most [`crate::MAX_COMMAND_LINE`] bytes.
    pub command_line: String,
    /// The rule that found the entry.
    pub source: Source,
}

/// A file, or a section of a unified kernel image. It was a regular file when the entry was found.
#[derive(Debug)]
pub struct BootFile {
    /// The position of its file system in [`Disk::file_systems`].
    pub file_system: usize,
    /// Its absolute path in this file system.
    pub path: String,
    /// Where the content begins in `file`, in bytes.
    pub offset: u64,
    /// The length of the content, in bytes. It is not zero.
    pub size: u64,
    /// Open for reading.
    pub file: File,
}

/// The rule that found an entry, and the file that describes it. Its text is for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// How the entry was found.
    pub rule: Rule,
    /// The name of the file system with the file.
    pub file_system: String,
    /// The unified kernel image, the boot loader entry, the configuration, or the kernel.
    pub path: String,
}

/// The rules, in the order in which they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// A kernel with its initrd and command line in one file (UAPI.5).
    UnifiedKernelImage,
    /// An entry of the Boot Loader Specification (type 1).
    BootLoaderEntry,
    /// A menu entry of a `grub.cfg`.
    Grub,
    /// A label of an `extlinux.conf` or `syslinux.cfg`.
    Extlinux,
    /// The newest kernel in `/boot`.
    NewestKernel,
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = match self.rule {
            Rule::UnifiedKernelImage => "the unified kernel image",
            Rule::BootLoaderEntry => "the boot loader entry",
            Rule::Grub => "GRUB's configuration",
            Rule::Extlinux => "the configuration of SYSLINUX",
            Rule::NewestKernel => "the newest kernel",
        };
        let text = format!("{rule} {} on {}", self.path, self.file_system);
        formatter.write_str(&printable(&text, MAX_NOTE))
    }
}

/// An entry that a rule proposes. Its files may not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) kernel: Part,
    pub(crate) initrds: Vec<Part>,
    pub(crate) command_line: String,
    pub(crate) rule: Rule,
    pub(crate) described_by: Location,
}

/// A file, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) location: Location,
    /// Offset and length in bytes; `None` means the whole file.
    pub(crate) range: Option<(u64, u64)>,
}

impl From<Location> for Part {
    fn from(location: Location) -> Self {
        Self { location, range: None }
    }
}

/// Opens the files of the first candidate that can be booted. Notes why the others cannot.
pub(crate) fn open_first(
    disk: &Disk,
    candidates: impl IntoIterator<Item = Candidate>,
    notes: &mut Notes,
) -> Option<BootEntry> {
    candidates.into_iter().take(MAX_TRIED_ENTRIES).find_map(|candidate| {
        let described_by = disk.describe_location(&candidate.described_by);
        open(disk, candidate)
            .map_err(|reason| notes.add(format!("{described_by}: {reason}")))
            .ok()
    })
}

fn open(disk: &Disk, candidate: Candidate) -> Result<BootEntry, String> {
    let command_line = command_line::clean(&candidate.command_line)?;
    let kernel = open_part(disk, candidate.kernel, "the kernel", MAX_KERNEL_SIZE)?;
    if candidate.initrds.len() > MAX_INITRDS {
        let count = candidate.initrds.len();
        return Err(format!("there are {count} initrds, more than {MAX_INITRDS}"));
    }
    let mut initrds = Vec::new();
    let mut left = MAX_INITRD_SIZE;
    for part in candidate.initrds {
        let initrd = open_part(disk, part, "the initrd", left)?;
        // Each is padded to a multiple of four bytes.
        left = left.saturating_sub(initrd.size.next_multiple_of(4));
        initrds.push(initrd);
    }
    let described_by = candidate.described_by;
    let file_system = disk.file_systems().get(described_by.file_system);
    Ok(BootEntry {
        kernel,
        initrds,
        command_line,
        source: Source {
            rule: candidate.rule,
            file_system: file_system.map(|it| it.name.clone()).unwrap_or_default(),
            path: described_by.path,
        },
    })
}

fn open_part(disk: &Disk, part: Part, what: &str, max: u64) -> Result<BootFile, String> {
    let location = part.location;
    let at_file = |reason: String| format!("{what} {} {reason}", disk.describe_location(&location));
    // The section that is used has a limit, not the file around it.
    let max_file = if part.range.is_some() { u64::MAX } else { max };
    let (file, file_size) = disk
        .open(&location, max_file)
        .map_err(|error| at_file(error.to_string()))?;
    let (offset, size) = part.range.unwrap_or((0, file_size));
    if offset.checked_add(size).is_none_or(|end| end > file_size) {
        return Err(at_file("is truncated".to_owned()));
    }
    if size > max {
        return Err(at_file(format!("has {size} bytes, more than the limit of {max}")));
    }
    if size == 0 {
        return Err(at_file("is empty".to_owned()));
    }
    Ok(BootFile {
        file_system: location.file_system,
        path: location.path,
        offset,
        size,
        file,
    })
}

/// What was found and could not be booted, for the error text.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    texts: Vec<String>,
    omitted: usize,
}

impl Notes {
    pub(crate) fn add(&mut self, text: impl AsRef<str>) {
        let text = printable(text.as_ref(), MAX_NOTE);
        if self.texts.contains(&text) {
            return;
        }
        if self.texts.len() < MAX_NOTES {
            self.texts.push(text);
        } else {
            self.omitted += 1;
        }
    }
}

impl fmt::Display for Notes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.texts.join("; "))?;
        if self.omitted > 0 {
            write!(formatter, "; and {} more", self.omitted)?;
        }
        Ok(())
    }
}

/// Replaces characters that are not printable ASCII by `?`, and clips the text to `max` bytes.
pub(crate) fn printable(text: &str, max: usize) -> String {
    let show = |character: char| match character {
        ' '..='~' => character,
        _ => '?',
    };
    let mut shown: String = text.chars().take(max).map(show).collect();
    if text.chars().nth(max).is_some() {
        shown.truncate(max.saturating_sub(3));
        shown.push_str("...");
    }
    shown
}
