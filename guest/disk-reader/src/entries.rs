//! Entries of the Boot Loader Specification (UAPI.1), type 1, and the settings of systemd-boot. GRUB's `blscfg` command
//! reads the same entries.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

use crate::boot::{BootEntry, Candidate, MAX_INITRDS, Notes, Rule, open_first};
use crate::disk::{Disk, Location, ReadError, insert_sorted};
use crate::{pattern, version};

/// The variables of GRUB, which entries may use.
pub(crate) type Variables = BTreeMap<String, String>;

/// The directories of entries: on the partition of a boot loader, and on a file system with the directory `/boot`.
pub(crate) const DIRECTORIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];

/// The largest size of an entry or of `loader.conf`, in bytes. Entries have some hundred bytes.
const MAX_FILE: usize = 64 << 10;

/// The largest number of entries that are read. An installation has one for each of its kernels.
const MAX_ENTRIES: usize = 512;

/// The longest pattern for names of entries, in characters: that of a file name.
const MAX_PATTERN: usize = 255;

/// The longest text after variables have been replaced, in bytes. A command line may have 4096 bytes.
const MAX_EXPANDED: usize = 16 << 10;

/// A kernel to boot, as a file in one of [`DIRECTORIES`] describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) location: Location,
    pub(crate) title: String,
    pub(crate) order: BootOrder,
    linux: String,
    initrds: Vec<String>,
    options: Vec<String>,
}

/// What decides the order of entries in a boot menu.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BootOrder {
    /// The file name without its suffix and without the counter of boot attempts.
    pub(crate) id: String,
    pub(crate) sort_key: Option<String>,
    pub(crate) machine_id: String,
    pub(crate) version: String,
    /// All attempts to boot the entry have failed (systemd's automatic boot assessment).
    pub(crate) is_bad: bool,
}

impl BootOrder {
    /// Returns the order that the name of the file gives, without the fields in the file.
    pub(crate) fn of_file(name: &str) -> Self {
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        let (id, left) = split_counter(stem).unwrap_or((stem, 1));
        Self {
            id: id.to_owned(),
            is_bad: left == 0,
            ..Self::default()
        }
    }

    /// Compares two entries. The one that comes first in the menu is less.
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        let by_key = match (&self.sort_key, &other.sort_key) {
            (Some(key), Some(other_key)) => key
                .cmp(other_key)
                .then_with(|| self.machine_id.cmp(&other.machine_id))
                .then_with(|| version::compare(&other.version, &self.version)),
            (key, other_key) => key.is_none().cmp(&other_key.is_none()),
        };
        self.is_bad
            .cmp(&other.is_bad)
            .then(by_key)
            .then_with(|| version::compare(&other.id, &self.id))
            // Comparing versions ignores some characters, so different names can be equal up to here.
            .then_with(|| Reverse(&self.id).cmp(&Reverse(&other.id)))
    }
}

/// Splits the counter off a name: `+LEFT` or `+LEFT-DONE`. Returns the id and the number of attempts that are left.
fn split_counter(stem: &str) -> Option<(&str, u32)> {
    let (id, counter) = stem.rsplit_once('+')?;
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    done.parse::<u32>().ok()?;
    Some((id, left.parse().ok()?))
}

/// The settings of systemd-boot in `loader.conf`.
#[derive(Debug, Default)]
pub(crate) struct LoaderSettings {
    default: Option<String>,
}

impl LoaderSettings {
    pub(crate) fn read(disk: &Disk) -> Self {
        let read = |file_system| {
            let location = Location::new(file_system, "/loader/loader.conf");
            disk.read_text(&location, MAX_FILE).ok()
        };
        let text = disk.boot_order().into_iter().find_map(read).unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let default = fields(text).filter(|(key, _)| *key == "default").last();
        Self {
            // `@saved` and the like refer to variables of the firmware.
            default: default
                .map(|(_, pattern)| pattern.chars().take(MAX_PATTERN).collect())
                .filter(|pattern: &String| !pattern.starts_with('@')),
        }
    }

    /// Whether the pattern of the default entry matches an id. Patterns may have the suffix of the file.
    pub(crate) fn is_default(&self, id: &str) -> bool {
        let is_match = |pattern: &str| pattern::is_match(pattern, id);
        self.default.as_deref().is_some_and(|pattern| {
            let stem = pattern.strip_suffix(".conf").or_else(|| pattern.strip_suffix(".efi"));
            is_match(pattern) || stem.is_some_and(is_match)
        })
    }
}

/// Whether an error means that there is nothing to report.
pub(crate) fn is_absent(error: &ReadError) -> bool {
    matches!(error, ReadError::NotFound)
}

/// Reads the entries of all file systems, in the order of a boot menu.
pub(crate) fn collect(disk: &Disk, notes: &mut Notes) -> Vec<Entry> {
    let mut entries = Vec::new();
    for file_system in disk.boot_order() {
        for directory in DIRECTORIES {
            for entry in collect_in(disk, &Location::new(file_system, directory), notes) {
                insert(&mut entries, entry);
                entries.truncate(MAX_ENTRIES);
            }
        }
    }
    entries
}

/// Reads the entries in a directory, in the order of a boot menu.
pub(crate) fn collect_in(disk: &Disk, directory: &Location, notes: &mut Notes) -> Vec<Entry> {
    let names = match disk.list(directory) {
        Ok(names) => names,
        Err(error) => {
            if !is_absent(&error) {
                notes.add(format!("{} {error}", disk.describe_location(directory)));
            }
            return Vec::new();
        }
    };
    let mut entries = Vec::new();
    for name in names.iter().filter(|name| name.ends_with(".conf")).take(MAX_ENTRIES) {
        let location = Location::new(directory.file_system, format!("{}/{name}", directory.path));
        let text = disk.read_text(&location, MAX_FILE).map_err(|error| error.to_string());
        match text.and_then(|text| parse(&text, &location)) {
            Ok(entry) => insert(&mut entries, entry),
            Err(reason) => notes.add(format!("{} {reason}", disk.describe_location(&location))),
        }
    }
    entries
}

fn insert(entries: &mut Vec<Entry>, entry: Entry) {
    insert_sorted(entries, entry, |left, right| left.order.compare(&right.order));
}

/// Parses an entry. Fails if it boots no Linux kernel on this architecture.
fn parse(text: &str, location: &Location) -> Result<Entry, String> {
    let mut entry = Entry {
        location: location.clone(),
        title: String::new(),
        order: BootOrder::of_file(location.name()),
        linux: String::new(),
        initrds: Vec::new(),
        options: Vec::new(),
    };
    for (key, value) in fields(text) {
        let value = value.to_owned();
        match key {
            "title" => entry.title = value,
            "version" => entry.order.version = value,
            "sort-key" => entry.order.sort_key = Some(value),
            "machine-id" => entry.order.machine_id = value,
            "linux" => entry.linux = value,
            "initrd" if entry.initrds.len() <= MAX_INITRDS => entry.initrds.push(value),
            "options" => entry.options.push(value),
            "architecture" if !matches!(value.to_ascii_lowercase().as_str(), "x64" | "x86_64") => {
                return Err(format!("is for the architecture {value}"));
            }
            // Keys of GRUB (grub_users, grub_class, grub_arg, id) and those of other kinds of entries.
            _ => {}
        }
    }
    if entry.linux.is_empty() {
        return Err("has no key `linux`".to_owned());
    }
    Ok(entry)
}

/// Returns the keys and values of a file's lines.
fn fields(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (key, value) = line.split_once(|character: char| character.is_ascii_whitespace())?;
        (!key.starts_with('#')).then(|| (key, value.trim_start()))
    })
}

/// Finds the entry that the boot loader would boot: the default of systemd-boot's settings or of GRUB's environment,
/// and otherwise the first.
///
/// `variables` are GRUB's. `None` means that the disk has no configuration of GRUB, so entries contain no variables.
pub(crate) fn find(
    disk: &Disk,
    entries: &[Entry],
    variables: Option<&Variables>,
    notes: &mut Notes,
) -> Option<BootEntry> {
    let settings = LoaderSettings::read(disk);
    let saved = variables.and_then(|variables| variables.get("saved_entry"));
    let is_saved = |entry: &Entry| saved.is_some_and(|saved| *saved == entry.order.id || *saved == entry.title);
    let is_default = |entry: &&Entry| settings.is_default(&entry.order.id) || is_saved(entry);
    let (defaults, others): (Vec<_>, Vec<_>) = entries.iter().partition(is_default);
    let candidates = defaults
        .into_iter()
        .chain(others)
        .map(|entry| entry.to_candidate(disk, variables));
    open_first(disk, candidates, notes)
}

impl Entry {
    /// Proposes the entry, with GRUB's variables replaced if there are any.
    pub(crate) fn to_candidate(&self, disk: &Disk, variables: Option<&Variables>) -> Candidate {
        let replace = |text: &str| variables.map_or_else(|| text.to_owned(), |variables| expand(text, variables));
        let kernel = self.locate(disk, replace(&self.linux).trim());
        let mut initrds = Vec::new();
        // Microcode that GRUB loads before the initrd of each entry.
        let early = variables.and_then(|variables| variables.get("early_initrd"));
        for name in early.into_iter().flat_map(|names| names.split_ascii_whitespace()) {
            let location = Location::new(kernel.file_system, format!("{}/{name}", kernel.directory()));
            if disk.is_file(&location) {
                initrds.push(location.into());
            }
        }
        for initrd in &self.initrds {
            // A variable may add further initrds to a line.
            let paths = replace(initrd);
            initrds.extend(
                paths
                    .split_ascii_whitespace()
                    .map(|path| self.locate(disk, path).into()),
            );
        }
        initrds.truncate(MAX_INITRDS + 1);
        let options = if self.options.is_empty() && variables.is_some() {
            // GRUB uses this variable if an entry has no options.
            replace("$default_kernelopts")
        } else {
            replace(&self.options.join(" "))
        };
        Candidate {
            kernel: kernel.into(),
            initrds,
            command_line: options,
            rule: Rule::BootLoaderEntry,
            described_by: self.location.clone(),
        }
    }

    /// Returns the location of a file of the entry. Paths are relative to the root of the file system. If the entry is
    /// below `/boot`, and no such file exists, they are relative to `/boot`: some tools write them as if it were a
    /// partition.
    fn locate(&self, disk: &Disk, path: &str) -> Location {
        let absolute = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/{path}")
        };
        let location = Location::new(self.location.file_system, absolute);
        if !self.location.path.starts_with("/boot/") || disk.is_file(&location) {
            return location;
        }
        let in_boot = Location::new(location.file_system, format!("/boot{}", location.path));
        if disk.is_file(&in_boot) { in_boot } else { location }
    }
}

/// Replaces `$name` and `${name}` by the variables' values. A variable that is not set is empty.
fn expand(text: &str, variables: &Variables) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
        let braced = after.strip_prefix('{').and_then(|after| after.split_once('}'));
        let (name, after) = braced.unwrap_or_else(|| {
            let end = after.find(|character| !is_name(character)).unwrap_or(after.len());
            after.split_at(end)
        });
        match variables.get(name) {
            Some(value) => expanded.push_str(value),
            None if name.is_empty() => expanded.push('$'),
            None => {}
        }
        rest = after;
        if expanded.len() > MAX_EXPANDED {
            // The command line is refused for its length.
            return expanded;
        }
    }
    expanded + rest
}

/// Gives a text to each parser of this module.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_parts(text: &str, location: &Location) -> Result<(), String> {
    LoaderSettings::parse(text).is_default("m-6.1.0-18-amd64");
    let variables = Variables::from([("kernelopts".to_owned(), text.to_owned())]);
    expand(text, &variables);
    let name: String = text.chars().take(MAX_PATTERN).collect();
    let entry = parse(text, location)?;
    let _ = BootOrder::of_file(&name).compare(&entry.order);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, text: &str) -> Entry {
        parse(text, &Location::new(0, format!("/loader/entries/{name}"))).unwrap()
    }

    #[test]
    fn entries_are_in_the_order_of_the_specification() {
        // Each line is the expected order.
        for names in [
            &[
                ("c.conf", "linux /c\nsort-key a\nversion 2"),
                ("b.conf", "linux /b\nsort-key a\nversion 1"),
                ("d.conf", "linux /d\nsort-key b\nversion 3"),
                ("z.conf", "linux /z\nversion 9"),
            ][..],
            &[
                ("m-6.10.0.conf", "linux /a"),
                ("m-6.9.0.conf", "linux /a"),
                ("m-0-rescue.conf", "linux /a"),
            ],
            &[
                ("b.conf", "linux /a\nsort-key k\nmachine-id 1\nversion 1"),
                ("a.conf", "linux /a\nsort-key k\nmachine-id 2\nversion 9"),
            ],
            &[("a+1.conf", "linux /a"), ("b+0-3.conf", "linux /b")],
            &[("a+x.conf", "linux /b"), ("a+3-0.conf", "linux /a")],
        ] {
            let expected: Vec<_> = names.iter().map(|(name, text)| entry(name, text)).collect();
            for rotation in 0..expected.len() {
                let mut entries = Vec::new();
                for entry in expected.iter().cycle().skip(rotation).take(expected.len()) {
                    insert(&mut entries, entry.clone());
                }
                assert_eq!(entries, expected);
            }
        }
    }

    #[test]
    fn default_matches_ids_with_and_without_suffix() {
        for (settings, id, expected) in [
            ("timeout 3\ndefault arch", "arch", true),
            ("default arch.conf", "arch", true),
            ("default\tARCH-*.conf", "arch-lts", true),
            ("default debian*.efi", "debian-6.1", true),
            ("#default arch", "arch", false),
            ("default @saved", "@saved", false),
            ("default a\ndefault b", "a", false),
            ("", "arch", false),
        ] {
            assert_eq!(
                LoaderSettings::parse(settings).is_default(id),
                expected,
                "{settings:?} {id}"
            );
        }
    }

    #[test]
    fn variables_are_replaced() {
        let variables = Variables::from([("kernelopts".to_owned(), "root=/dev/vda1 ro".to_owned())]);
        for (text, expected) in [
            ("$kernelopts", "root=/dev/vda1 ro"),
            ("a ${kernelopts} b", "a root=/dev/vda1 ro b"),
            ("a $tuned_params", "a "),
            ("price$ $", "price$ $"),
            ("${kernelopts", "${kernelopts"),
        ] {
            assert_eq!(expand(text, &variables), expected, "{text}");
        }
        let bomb = Variables::from([("x".to_owned(), "y".repeat(4096))]);
        assert!(expand(&"$x".repeat(10_000), &bomb).len() <= MAX_EXPANDED + 4096);
    }

    #[test]
    fn entry_that_boots_no_kernel_is_refused() {
        let location = Location::new(0, "/loader/entries/a.conf");
        for text in ["", "title x", "efi /EFI/x.efi", "linux /a\narchitecture aa64", "linux"] {
            assert!(parse(text, &location).is_err(), "{text:?}");
        }
        assert!(parse("linux /a\narchitecture X64", &location).is_ok());
    }
}
