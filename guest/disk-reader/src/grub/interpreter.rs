//! Executes a configuration of GRUB: statements, variables, functions, and the names of devices.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::script::{self, Block, Content, Statement, Word};
use crate::boot::{Notes, Part};
use crate::disk::{Disk, Location};
use crate::entries::{Entry, Variables};
use crate::partitions::PartitionType;

/// The largest size of a configuration, in bytes. One with a hundred entries has about 200 KiB.
const MAX_CONFIGURATION: usize = 512 << 10;

/// How much work is done for a menu: the number of executed commands and expanded bytes. A large menu needs some
/// hundred thousand.
const MAX_WORK: usize = 8 << 20;

/// The largest length of the words of a command after expansion, in bytes. A command line may have 4096 bytes.
const MAX_EXPANDED: usize = 16 << 10;

/// The largest number of variables. Generated files use about fifty.
const MAX_VARIABLES: usize = 1024;

/// How deep functions and included files call each other. Generated files use two levels.
const MAX_CALLS: usize = 8;

/// The largest number of menu items. Menus with many snapshots have some hundred.
pub(super) const MAX_ITEMS: usize = 2048;

/// Why a script ends early.
#[derive(Debug)]
pub(super) enum Stop {
    /// `return`, with its status.
    Return(bool),
    /// `exit`, or another configuration took over.
    Exit,
    /// A limit was reached.
    Limit(&'static str),
}

/// The result of a statement: whether it succeeded.
pub(super) type Status = Result<bool, Stop>;

/// What `linux` and `initrd` have loaded.
#[derive(Debug, Clone, Default)]
pub(super) struct Loaded {
    pub(super) kernel: Option<Location>,
    pub(super) command_line: String,
    pub(super) initrds: Vec<Part>,
}

/// An item of a menu.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) title: String,
    pub(super) id: String,
    pub(super) content: ItemContent,
}

#[derive(Debug, Clone)]
pub(super) enum ItemContent {
    Script { is_submenu: bool, block: Block },
    BootLoaderEntry(Box<Entry>),
}

/// The state of a script. It is copied to execute the script of a menu entry.
#[derive(Debug, Clone)]
pub(super) struct Interpreter<'d> {
    pub(super) disk: &'d Disk,
    /// The configuration that is executed, or was executed last.
    pub(super) location: Location,
    pub(super) variables: Variables,
    pub(super) items: Vec<Item>,
    pub(super) loaded: Loaded,
    /// Whether `blscfg` was executed.
    pub(super) has_blscfg: bool,
    functions: BTreeMap<String, Block>,
    arguments: Vec<String>,
    last_status: bool,
    work: usize,
    calls: usize,
}

impl<'d> Interpreter<'d> {
    /// Executes the configuration at `location`.
    pub(super) fn run(disk: &'d Disk, location: &Location, notes: &mut Notes) -> Result<Self, String> {
        let device = device_name(location.file_system);
        let prefix = format!("({device}){}", location.directory());
        let about = disk.file_systems().get(location.file_system);
        let is_efi = about.is_some_and(|it| it.partition_type == PartitionType::EfiSystem || it.kind == "vfat");
        let variables = [
            ("root", device.as_str()),
            ("prefix", prefix.as_str()),
            ("cmdpath", prefix.as_str()),
            ("grub_cpu", "x86_64"),
            ("grub_platform", if is_efi { "efi" } else { "pc" }),
            ("feature_menuentry_id", "y"),
            ("feature_menuentry_options", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_default_font_path", "y"),
            ("feature_all_video_module", "y"),
            ("feature_timeout_style", "y"),
            // Ubuntu boots without the initrd first, and with it if that failed. Both use the initrd here: whether the
            // first try failed is not known.
            ("initrdfail", "1"),
        ];
        let mut interpreter = Self {
            disk,
            location: location.clone(),
            variables: variables
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            items: Vec::new(),
            loaded: Loaded::default(),
            has_blscfg: false,
            functions: BTreeMap::new(),
            arguments: Vec::new(),
            last_status: true,
            work: MAX_WORK,
            calls: 0,
        };
        match interpreter.execute_file(location.clone(), notes)? {
            Err(Stop::Limit(limit)) => Err(format!("the limit of {limit} is reached")),
            Ok(_) | Err(Stop::Return(_) | Stop::Exit) => Ok(interpreter),
        }
    }

    /// Executes another file. Fails if it cannot be read or parsed.
    pub(super) fn execute_file(&mut self, location: Location, notes: &mut Notes) -> Result<Status, String> {
        let text = self
            .disk
            .read_text(&location, MAX_CONFIGURATION)
            .map_err(|error| error.to_string())?;
        let block = script::parse(&text)?;
        let directory = format!("({}){}", device_name(location.file_system), location.directory());
        self.set("config_file", &format!("{directory}/{}", location.name()));
        self.set("config_directory", &directory);
        self.location = location;
        Ok(self.call(&block, notes))
    }

    /// Executes the block of a menu entry, a function or a file.
    pub(super) fn call(&mut self, block: &Block, notes: &mut Notes) -> Status {
        if self.calls == MAX_CALLS {
            return Err(Stop::Limit("nested calls"));
        }
        self.calls += 1;
        let status = self.execute(block, notes);
        self.calls -= 1;
        status
    }

    /// Executes a block with `arguments` as `$1` and so on.
    pub(super) fn call_with(&mut self, block: &Block, arguments: Vec<String>, notes: &mut Notes) -> Status {
        let outer = std::mem::replace(&mut self.arguments, arguments);
        let status = self.call(block, notes);
        self.arguments = outer;
        match status {
            Err(Stop::Return(status)) => Ok(status),
            status => status,
        }
    }

    pub(super) fn function(&self, name: &str) -> Option<Block> {
        self.functions.get(name).map(Rc::clone)
    }

    fn execute(&mut self, block: &[Statement], notes: &mut Notes) -> Status {
        for statement in block {
            self.last_status = self.execute_statement(statement, notes)?;
        }
        Ok(self.last_status)
    }

    fn execute_statement(&mut self, statement: &Statement, notes: &mut Notes) -> Status {
        self.spend(1)?;
        match statement {
            Statement::Command { words, block } => {
                let words = self.expand_all(words)?;
                self.command(words, block.as_ref(), notes)
            }
            Statement::If { arms, otherwise } => {
                for (condition, body) in arms {
                    self.spend(1)?;
                    if self.execute(condition, notes)? {
                        return self.execute(body, notes);
                    }
                }
                self.execute(otherwise, notes)
            }
            Statement::For { variable, values, body } => {
                let variable = self.expand_all(std::slice::from_ref(variable))?.concat();
                for value in self.expand_all(values)? {
                    self.spend(1)?;
                    self.set(&variable, &value);
                    self.execute(body, notes)?;
                }
                Ok(true)
            }
            Statement::Loop => {
                let location = self.disk.describe_location(&self.location);
                notes.add(format!("{location}: a loop was skipped, which is not supported"));
                Ok(false)
            }
            Statement::Function { name, body } => {
                let name = self.expand_all(std::slice::from_ref(name))?.concat();
                if self.functions.len() < MAX_VARIABLES {
                    self.functions.insert(name, Rc::clone(body));
                }
                Ok(true)
            }
        }
    }

    fn spend(&mut self, work: usize) -> Result<(), Stop> {
        self.work = self.work.checked_sub(work).ok_or(Stop::Limit("executed commands"))?;
        Ok(())
    }

    /// Reduces the work that is left to that of `copy`, which has executed a menu entry.
    pub(super) fn take_work_of(&mut self, copy: &Self) {
        self.work = copy.work;
    }

    /// Expands words. A variable without quotes may become several words, or none.
    fn expand_all(&mut self, words: &[Word]) -> Result<Vec<String>, Stop> {
        let mut expanded = Vec::new();
        let mut length = 0;
        for word in words {
            let mut current: Option<String> = None;
            for segment in word {
                let value = match &segment.content {
                    Content::Text(text) => text.clone(),
                    Content::Variable(name) => self.value(name),
                };
                length += value.len();
                self.spend(value.len())?;
                if length > MAX_EXPANDED {
                    return Err(Stop::Limit("the length of a command"));
                }
                if segment.is_quoted || matches!(segment.content, Content::Text(_)) {
                    current.get_or_insert_default().push_str(&value);
                    continue;
                }
                if value.starts_with(char::is_whitespace) {
                    expanded.extend(current.take());
                }
                let mut pieces = value.split_ascii_whitespace().peekable();
                while let Some(piece) = pieces.next() {
                    current.get_or_insert_default().push_str(piece);
                    if pieces.peek().is_some() || value.ends_with(char::is_whitespace) {
                        expanded.extend(current.take());
                    }
                }
            }
            expanded.extend(current);
        }
        Ok(expanded)
    }

    fn value(&self, name: &str) -> String {
        match name {
            "?" => u8::from(!self.last_status).to_string(),
            "#" => self.arguments.len().to_string(),
            "@" | "*" => self.arguments.join(" "),
            name => match name.parse::<usize>() {
                Ok(number) => number.checked_sub(1).and_then(|at| self.arguments.get(at)).cloned(),
                Err(_) => self.variables.get(name).cloned(),
            }
            .unwrap_or_default(),
        }
    }

    /// Sets a variable. Ignores those beyond the limit.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        if self.variables.contains_key(name) || self.variables.len() < MAX_VARIABLES {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    pub(super) fn get(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// Finds the file of a path: `(device)/path`, or a path on the device `$root`.
    pub(super) fn locate(&self, path: &str) -> Option<Location> {
        let (device, path) = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (self.get("root"), path),
        };
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/{path}")
        };
        Some(Location::new(self.file_system(device)?, path))
    }

    /// Finds the file system on a device: one that `search` has set, or one by the number of its partition.
    pub(super) fn file_system(&self, device: &str) -> Option<usize> {
        let device = device.trim_start_matches('(').trim_end_matches(')');
        let file_systems = self.disk.file_systems();
        if let Some(number) = device.strip_prefix(DEVICE_PREFIX) {
            return number.parse().ok().filter(|number| *number < file_systems.len());
        }
        // hd0,gpt2 or hd0,msdos2 or hd0,2. There is only one disk, so its number is ignored.
        let number = match device.split_once(',') {
            Some((_, partition)) => {
                let digits = partition.trim_start_matches(|character: char| !character.is_ascii_digit());
                Some(digits.parse::<u32>().ok()?)
            }
            None => None,
        };
        file_systems.iter().position(|it| it.number == number)
    }
}

/// What the names of devices that `search` sets begin with.
const DEVICE_PREFIX: &str = "fs";

pub(super) fn device_name(file_system: usize) -> String {
    format!("{DEVICE_PREFIX}{file_system}")
}
