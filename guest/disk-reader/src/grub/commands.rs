//! The commands of GRUB that decide which kernel is booted. All others have no effect.

use std::rc::Rc;

use super::environment;
use super::expression::{self, FileTest};
use super::interpreter::{Interpreter, Item, ItemContent, MAX_ITEMS, Status, Stop, device_name};
use super::script::Block;
use crate::boot::{MAX_INITRDS, Notes};
use crate::disk::{FileSystem, Location};
use crate::entries::{self, DIRECTORIES};

/// The largest size of `grubenv`, in bytes. It has 1024 bytes as a rule.
const MAX_ENVIRONMENT: usize = 64 << 10;

/// The options of `menuentry` and `submenu` that have a value.
const OPTIONS_WITH_VALUE: [&str; 5] = ["--class", "--users", "--hotkey", "--source", "--id"];

impl Interpreter<'_> {
    pub(super) fn command(&mut self, words: Vec<String>, block: Option<&Block>, notes: &mut Notes) -> Status {
        let Some((name, arguments)) = words.split_first() else {
            return Ok(true);
        };
        if let Some(function) = self.function(name) {
            return self.call_with(&function, arguments.to_vec(), notes);
        }
        match name.as_str() {
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|argument| argument.split_once('=')) {
                    self.set(name, value);
                }
                Ok(true)
            }
            "unset" => {
                for argument in arguments {
                    self.variables.remove(argument);
                }
                Ok(true)
            }
            "increment" => Ok(self.add(arguments, 1)),
            "decrement" => Ok(self.add(arguments, -1)),
            "[" => {
                let (end, arguments) = arguments.split_last().unzip();
                let is_closed = end.is_some_and(|end| end == "]");
                Ok(is_closed && self.test(arguments.unwrap_or_default()))
            }
            "test" => Ok(self.test(arguments)),
            "search" => Ok(self.search(SearchKey::of_options(arguments), arguments, true)),
            "search.fs_uuid" => Ok(self.search(Some(SearchKey::Uuid), arguments, false)),
            "search.fs_label" => Ok(self.search(Some(SearchKey::Label), arguments, false)),
            "search.file" => Ok(self.search(Some(SearchKey::File), arguments, false)),
            "load_env" => Ok(self.load_environment(arguments)),
            "menuentry" | "submenu" => {
                if let Some(block) = block {
                    self.add_item(name == "submenu", arguments, block);
                }
                Ok(true)
            }
            "blscfg" => Ok(self.add_boot_loader_entries(notes)),
            "linux" | "linux16" | "linuxefi" => Ok(self.load_kernel(arguments)),
            "initrd" | "initrd16" | "initrdefi" => {
                let found: Vec<_> = arguments.iter().filter_map(|path| self.locate(path)).collect();
                // One more than the maximum is kept, so that the entry is refused for it.
                let room = (MAX_INITRDS + 1).saturating_sub(self.loaded.initrds.len());
                self.loaded.initrds.extend(found.into_iter().take(room).map(Into::into));
                Ok(true)
            }
            "source" | "." => self.include(arguments, notes),
            "configfile" => {
                let file = arguments.first().and_then(|path| self.locate(path));
                if !file.as_ref().is_some_and(|file| self.disk.is_file(file)) {
                    return Ok(false);
                }
                self.items.clear();
                self.include(arguments, notes)?;
                // The menu of the other configuration replaces this one.
                Err(Stop::Exit)
            }
            "return" => Err(Stop::Return(arguments.first().is_none_or(|status| status == "0"))),
            "exit" => Err(Stop::Exit),
            assignment if arguments.is_empty() && is_assignment(assignment) => {
                let (name, value) = assignment.split_once('=').unwrap_or_default();
                self.set(name, value);
                Ok(true)
            }
            "true" | "export" | "insmod" | "echo" | "save_env" | "terminal_input" | "terminal_output" => Ok(true),
            // Among others `loadfont`, `keystatus` and `sleep`: there is no screen and no keyboard.
            _ => Ok(false),
        }
    }

    fn add(&mut self, arguments: &[String], difference: i64) -> bool {
        let Some(name) = arguments.first() else {
            return false;
        };
        let value = self.get(name).parse::<i64>().unwrap_or_default();
        self.set(&name.clone(), &value.saturating_add(difference).to_string());
        true
    }

    fn test(&self, arguments: &[String]) -> bool {
        expression::evaluate(arguments, &|path, test| {
            let Some(location) = self.locate(path) else {
                return false;
            };
            match test {
                FileTest::Exists => self.disk.is_file(&location) || self.disk.is_directory(&location),
                FileTest::IsFile => self.disk.is_file(&location),
                FileTest::IsDirectory => self.disk.is_directory(&location),
                FileTest::HasContent => self.disk.open(&location, u64::MAX).is_ok_and(|(_, size)| size > 0),
            }
        })
    }

    /// Finds a file system, and sets a variable to the name of its device. The form with options has the variable in
    /// `--set`, the other form as second argument.
    fn search(&mut self, key: Option<SearchKey>, arguments: &[String], has_options: bool) -> bool {
        let mut variable = (!has_options).then(|| arguments.get(1).map_or("root", String::as_str));
        let mut value = None;
        // The word after `--set`: the variable if another word is the value, else the value.
        let mut either = None;
        let mut rest = arguments.iter().peekable();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--set" | "-s" => {
                    variable = Some("root");
                    either = rest.next_if(|next| !next.starts_with('-')).map(String::as_str);
                }
                // Hints only save time.
                "--hint" | "-h" => drop(rest.next()),
                option if option.starts_with("--set=") => variable = option.strip_prefix("--set="),
                option if option.starts_with('-') => {}
                argument => value = value.or(Some(argument)),
            }
        }
        if value.is_some() {
            variable = either.or(variable);
        }
        let (Some(key), Some(value)) = (key, value.or(either)) else {
            return false;
        };
        let found = self.find_file_system(key, value);
        if let (Some(found), Some(variable)) = (found, variable) {
            self.set(variable, &device_name(found));
        }
        found.is_some()
    }

    fn find_file_system(&self, key: SearchKey, value: &str) -> Option<usize> {
        let file_systems = self.disk.file_systems();
        let is_named = |name: &Option<String>| name.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(value));
        let is_match = |(at, it): &(usize, &FileSystem)| match key {
            SearchKey::Uuid => is_named(&it.uuid),
            SearchKey::Label => it.label.as_deref() == Some(value),
            SearchKey::File => {
                let location = Location::new(*at, value);
                self.disk.is_file(&location) || self.disk.is_directory(&location)
            }
        };
        file_systems.iter().enumerate().find(is_match).map(|(at, _)| at)
    }

    /// Reads variables from the environment block: those whose names are arguments, or all if no name is given.
    fn load_environment(&mut self, arguments: &[String]) -> bool {
        let mut path = format!("{}/grubenv", self.get("prefix"));
        let mut names: Vec<&str> = Vec::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-f" | "--file" => path = rest.next().cloned().unwrap_or_default(),
                option if option.starts_with("--file=") => {
                    path = option.strip_prefix("--file=").unwrap_or_default().to_owned();
                }
                option if option.starts_with('-') => {}
                name => names.push(name),
            }
        }
        let Some(location) = self.locate(&path) else {
            return false;
        };
        let Ok(text) = self.disk.read_text(&location, MAX_ENVIRONMENT) else {
            return false;
        };
        for (name, value) in environment::parse(&text) {
            if names.is_empty() || names.contains(&name.as_str()) {
                self.set(&name, &value);
            }
        }
        true
    }

    fn add_item(&mut self, is_submenu: bool, arguments: &[String], block: &Block) {
        let mut item = Item {
            title: String::new(),
            id: String::new(),
            content: ItemContent::Script {
                is_submenu,
                block: Rc::clone(block),
            },
        };
        let mut positional = Vec::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if OPTIONS_WITH_VALUE.contains(&argument.as_str()) {
                let value = rest.next().cloned().unwrap_or_default();
                if argument == "--id" {
                    item.id = value;
                }
            } else if let Some(id) = argument.strip_prefix("--id=") {
                id.clone_into(&mut item.id);
            } else if !argument.starts_with("--") {
                positional.push(argument);
            }
        }
        let title = positional.first().copied();
        item.title = title.cloned().unwrap_or_default();
        self.push_item(item);
    }

    fn push_item(&mut self, item: Item) {
        if self.items.len() < MAX_ITEMS {
            self.items.push(item);
        }
    }

    /// Adds the entries of the Boot Loader Specification on the device `$boot`, or else `$root`.
    fn add_boot_loader_entries(&mut self, notes: &mut Notes) -> bool {
        self.has_blscfg = true;
        let devices = [self.get("boot"), self.get("root")];
        let found = devices.map(|device| self.file_system(device));
        let mut file_systems: Vec<_> = found.into_iter().flatten().collect();
        file_systems.push(self.location.file_system);
        file_systems.dedup();
        for file_system in file_systems {
            for directory in DIRECTORIES {
                let entries = entries::collect_in(self.disk, &Location::new(file_system, directory), notes);
                if entries.is_empty() {
                    continue;
                }
                for entry in entries {
                    self.push_item(Item {
                        title: entry.title.clone(),
                        id: entry.order.id.clone(),
                        content: ItemContent::BootLoaderEntry(Box::new(entry)),
                    });
                }
                return true;
            }
        }
        false
    }

    fn load_kernel(&mut self, arguments: &[String]) -> bool {
        let Some((path, arguments)) = arguments.split_first() else {
            return false;
        };
        self.loaded.kernel = self.locate(path);
        self.loaded.initrds.clear();
        let quoted: Vec<_> = arguments.iter().map(|argument| quote(argument)).collect();
        self.loaded.command_line = quoted.join(" ");
        self.loaded.kernel.is_some()
    }

    fn include(&mut self, arguments: &[String], notes: &mut Notes) -> Status {
        let Some(location) = arguments.first().and_then(|path| self.locate(path)) else {
            return Ok(false);
        };
        let included_by = self.location.clone();
        match self.execute_file(location.clone(), notes) {
            Ok(status) => status,
            Err(reason) => {
                self.location = included_by;
                notes.add(format!("{}: {reason}", self.disk.describe_location(&location)));
                Ok(false)
            }
        }
    }
}

/// What `search` looks for.
#[derive(Debug, Clone, Copy)]
enum SearchKey {
    Uuid,
    Label,
    File,
}

impl SearchKey {
    fn of_options(arguments: &[String]) -> Option<Self> {
        arguments.iter().find_map(|argument| match argument.as_str() {
            "--fs-uuid" | "-u" => Some(Self::Uuid),
            "--label" | "--fs-label" | "-l" => Some(Self::Label),
            "--file" | "-f" => Some(Self::File),
            _ => None,
        })
    }
}

/// Whether a command is `NAME=VALUE`.
fn is_assignment(command: &str) -> bool {
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let parts = command.split_once('=');
    parts.is_some_and(|(name, _)| !name.is_empty() && name.chars().all(is_name))
}

/// Quotes an argument of a command line as GRUB does (`grub_create_loader_cmdline`).
fn quote(argument: &str) -> String {
    let mut quoted = String::new();
    for character in argument.chars() {
        if matches!(character, '\\' | '\'' | '"') {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    if quoted.contains(' ') {
        format!("\"{quoted}\"")
    } else {
        quoted
    }
}
