//! Configurations of SYSLINUX and its variants (EXTLINUX, ISOLINUX), which U-Boot's distro boot also reads.

use crate::boot::{BootEntry, Candidate, MAX_INITRDS, MAX_TRIED_ENTRIES, Notes, Rule, open_first};
use crate::disk::{Disk, Location};
use crate::entries::is_absent;

/// Where the configuration is looked for, on each file system.
const CONFIGURATIONS: [&str; 11] = [
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/syslinux.cfg",
    "/boot/isolinux/isolinux.cfg",
    "/isolinux/isolinux.cfg",
    "/isolinux.cfg",
];

/// The largest size of a configuration, in bytes. Those of distributions have a few kilobytes.
const MAX_CONFIGURATION: usize = 256 << 10;

/// How many files a configuration includes. Generated ones include two or three.
const MAX_INCLUDES: usize = 16;

/// The largest number of labels. A menu has a few.
const MAX_LABELS: usize = 256;

/// The settings of a label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Label {
    name: String,
    kernel: String,
    initrds: Vec<String>,
    append: Option<String>,
}

/// The directives of a file and of the files that it includes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Configuration {
    /// The value of `DEFAULT`, which may be a label or a module such as `menu.c32`.
    default: String,
    /// The name of the label with `MENU DEFAULT`.
    menu_default: Option<String>,
    /// The value of `APPEND` before the first label, for labels that have none.
    append: String,
    labels: Vec<Label>,
}

/// Finds the default label of the first configuration with a label that can be booted.
pub(crate) fn find(disk: &Disk, notes: &mut Notes) -> Option<BootEntry> {
    let all = (0..disk.file_systems().len())
        .flat_map(|file_system| CONFIGURATIONS.map(|path| Location::new(file_system, path)));
    for location in all {
        let mut configuration = Configuration::default();
        match read(disk, &location, &mut configuration) {
            Ok(()) => {}
            Err(None) => continue,
            Err(Some(reason)) => {
                notes.add(format!("{} {reason}", disk.describe_location(&location)));
                continue;
            }
        }
        let candidates = configuration.candidates(&location);
        if candidates.is_empty() {
            notes.add(format!(
                "{} has no label with a kernel",
                disk.describe_location(&location)
            ));
        }
        if let Some(entry) = open_first(disk, candidates, notes) {
            return Some(entry);
        }
    }
    None
}

/// Reads a configuration and the files that it includes. The error is `None` if there is no such file.
fn read(disk: &Disk, location: &Location, configuration: &mut Configuration) -> Result<(), Option<String>> {
    let text = disk.read_text(location, MAX_CONFIGURATION).map_err(|error| {
        let is_reported = !is_absent(&error);
        is_reported.then(|| error.to_string())
    })?;
    let includes = configuration.parse(&text);
    for path in includes.iter().take(MAX_INCLUDES) {
        let included = resolve(location, path);
        // Included files include no others. One that is missing may be for another boot loader.
        if let Ok(text) = disk.read_text(&included, MAX_CONFIGURATION) {
            configuration.parse(&text);
        }
    }
    Ok(())
}

/// Returns the location of a path in a configuration, which is relative to its directory.
fn resolve(configuration: &Location, path: &str) -> Location {
    // SYSLINUX has `::` for the root of its partition.
    let path = path.strip_prefix("::").unwrap_or(path);
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{}/{path}", configuration.directory())
    };
    Location::new(configuration.file_system, path)
}

impl Configuration {
    /// Adds the directives in `text`. Returns the files that it includes.
    fn parse(&mut self, text: &str) -> Vec<String> {
        let mut includes = Vec::new();
        // The directives of a label beyond the limit must not change another label.
        let mut is_dropped = false;
        for line in text.lines() {
            let (keyword, value) = split_word(line);
            let count = self.labels.len();
            match (keyword.to_ascii_lowercase().as_str(), self.labels.last_mut()) {
                ("default", _) => value.clone_into(&mut self.default),
                ("label", _) if count < MAX_LABELS => self.labels.push(Label {
                    name: value.to_owned(),
                    ..Label::default()
                }),
                ("label", _) => is_dropped = true,
                ("kernel" | "linux" | "initrd" | "append", _) if is_dropped => {}
                ("menu", _) if is_dropped && split_word(value).0.eq_ignore_ascii_case("default") => {}
                ("kernel" | "linux", Some(label)) => value.clone_into(&mut label.kernel),
                ("initrd", Some(label)) => {
                    label.initrds = value.split(',').take(MAX_INITRDS + 1).map(str::to_owned).collect();
                }
                ("append", Some(label)) => label.append = Some(value.to_owned()),
                ("append", None) => value.clone_into(&mut self.append),
                ("menu", Some(label)) if split_word(value).0.eq_ignore_ascii_case("default") => {
                    self.menu_default = Some(label.name.clone());
                }
                ("menu", _) if split_word(value).0.eq_ignore_ascii_case("include") => {
                    includes.push(split_word(split_word(value).1).0.to_owned());
                }
                ("include", _) if includes.len() < MAX_INCLUDES => includes.push(split_word(value).0.to_owned()),
                _ => {}
            }
        }
        includes
    }

    /// Returns the labels that have a kernel, the default first.
    fn candidates(&self, location: &Location) -> Vec<Candidate> {
        let is_default = |label: &Label| match &self.menu_default {
            Some(name) => label.name == *name,
            // Options after the label are for the kernel.
            None => label.name == split_word(&self.default).0 || label.name == self.default,
        };
        // Modules are programs of SYSLINUX.
        let has_kernel = |label: &&Label| !label.kernel.is_empty() && !label.kernel.ends_with(".c32");
        let labels = self.labels.iter().filter(has_kernel);
        let (defaults, others): (Vec<_>, Vec<_>) = labels.partition(|label| is_default(label));
        let labels = defaults.into_iter().chain(others).take(MAX_TRIED_ENTRIES);
        labels.map(|label| self.candidate(label, location)).collect()
    }

    fn candidate(&self, label: &Label, location: &Location) -> Candidate {
        let append = match label.append.as_deref() {
            // A dash removes what is set for all labels.
            Some("-") => "",
            Some(append) => append,
            None => &self.append,
        };
        let (initrd_arguments, arguments): (Vec<_>, Vec<_>) = append
            .split_ascii_whitespace()
            .partition(|argument| argument.starts_with("initrd="));
        let mut initrds = label.initrds.clone();
        if initrds.is_empty() {
            let paths = initrd_arguments
                .iter()
                .filter_map(|argument| argument.strip_prefix("initrd="));
            initrds = paths.flat_map(|paths| paths.split(',')).map(str::to_owned).collect();
        }
        initrds.truncate(MAX_INITRDS + 1);
        Candidate {
            kernel: resolve(location, &label.kernel).into(),
            initrds: initrds
                .iter()
                .map(|path| resolve(location, path.trim()).into())
                .collect(),
            command_line: arguments.join(" "),
            rule: Rule::Extlinux,
            described_by: location.clone(),
        }
    }
}

/// Splits the first word off a line.
fn split_word(line: &str) -> (&str, &str) {
    let line = line.trim();
    let (word, rest) = line
        .split_once(|character: char| character.is_ascii_whitespace())
        .unwrap_or((line, ""));
    (word, rest.trim_start())
}

/// Gives a text to the parser of this module.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_parts(text: &str, location: &Location) {
    let mut configuration = Configuration::default();
    configuration.parse(text);
    configuration.candidates(location);
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    #[test]
    fn label_beyond_the_limit_is_dropped_with_its_directives() {
        let mut text = String::new();
        for number in 0..MAX_LABELS {
            writeln!(text, "label l{number}\nkernel /k{number}\nappend a{number}").unwrap();
        }
        text +=
            "label beyond\nkernel /beyond\ninitrd /beyond\nappend beyond\nmenu default\ninclude /more\ndefault l3\n";
        let mut configuration = Configuration::default();

        let includes = configuration.parse(&text);

        let last = configuration.labels.last().unwrap();
        let expected = Label {
            name: "l255".to_owned(),
            kernel: "/k255".to_owned(),
            initrds: Vec::new(),
            append: Some("a255".to_owned()),
        };
        assert_eq!((configuration.labels.len(), last), (MAX_LABELS, &expected));
        assert_eq!(configuration.menu_default, None);
        assert_eq!(
            (configuration.default.as_str(), includes),
            ("l3", vec!["/more".to_owned()])
        );
    }
}
