//! The menu of a configuration, and the choice of its default entry.

use super::interpreter::{Interpreter, Item, ItemContent, Loaded, Stop};
use crate::boot::{BootEntry, Candidate, MAX_TRIED_ENTRIES, Notes, Rule, open_first};
use crate::disk::{Disk, Location};
use crate::entries::Variables;

/// How deep menus may be nested. Generated files have one level of submenus.
const MAX_SUBMENUS: usize = 4;

/// The state of GRUB when it shows the menu.
#[derive(Debug)]
pub(crate) struct Menu<'d> {
    interpreter: Interpreter<'d>,
}

impl<'d> Menu<'d> {
    pub(super) fn new(interpreter: Interpreter<'d>) -> Self {
        Self { interpreter }
    }

    /// The configuration that made the menu.
    pub(crate) fn location(&self) -> &Location {
        &self.interpreter.location
    }

    pub(crate) fn variables(&self) -> &Variables {
        &self.interpreter.variables
    }

    pub(super) fn is_empty(&self) -> bool {
        self.interpreter.items.is_empty() && !self.interpreter.has_blscfg
    }

    /// Whether the configuration includes entries of the Boot Loader Specification.
    pub(crate) fn has_entries_of_specification(&self) -> bool {
        self.interpreter.has_blscfg
    }

    /// Opens the default entry, or the first other entry that can be booted.
    pub(crate) fn choose(&self, disk: &Disk, notes: &mut Notes) -> Option<BootEntry> {
        let default = self.interpreter.get("default").to_owned();
        let mut choice = Choice {
            disk,
            tries: MAX_TRIED_ENTRIES,
            notes,
        };
        choice.choose(&mut self.interpreter.clone(), &default, 0)
    }
}

struct Choice<'c> {
    disk: &'c Disk,
    tries: usize,
    notes: &'c mut Notes,
}

impl Choice<'_> {
    fn choose(&mut self, menu: &mut Interpreter<'_>, default: &str, depth: usize) -> Option<BootEntry> {
        let (first, rest) = split_default(default);
        let items = std::mem::take(&mut menu.items);
        let default_at = position(&items, &first);
        let mut order: Vec<_> = (0..items.len()).collect();
        order[..=default_at.min(items.len().checked_sub(1)?)].rotate_right(1);
        for at in order {
            self.tries = self.tries.checked_sub(1)?;
            let rest = if at == default_at { rest } else { "" };
            if let Some(entry) = self.try_item(menu, &items[at], rest, depth) {
                return Some(entry);
            }
        }
        None
    }

    fn try_item(&mut self, menu: &mut Interpreter<'_>, item: &Item, rest: &str, depth: usize) -> Option<BootEntry> {
        let location = menu.location.clone();
        let candidate = match &item.content {
            ItemContent::BootLoaderEntry(entry) => entry.to_candidate(self.disk, Some(&menu.variables)),
            ItemContent::Script { is_submenu, block } => {
                let mut copy = menu.clone();
                let chosen = if item.id.is_empty() { &item.title } else { &item.id };
                copy.set("chosen", chosen);
                copy.loaded = Loaded::default();
                let status = copy.call_with(block, vec![item.title.clone()], self.notes);
                menu.take_work_of(&copy);
                if let Err(Stop::Limit(limit)) = status {
                    self.note(&location, item, &format!("the limit of {limit} is reached"));
                    return None;
                }
                if *is_submenu {
                    if depth == MAX_SUBMENUS {
                        self.note(
                            &location,
                            item,
                            &format!("menus are nested more than {MAX_SUBMENUS} deep"),
                        );
                        return None;
                    }
                    return self.choose(&mut copy, rest, depth + 1);
                }
                let Some(kernel) = copy.loaded.kernel else {
                    self.note(&location, item, "loads no Linux kernel from this disk");
                    return None;
                };
                Candidate {
                    kernel: kernel.into(),
                    initrds: copy.loaded.initrds,
                    command_line: copy.loaded.command_line,
                    rule: Rule::Grub,
                    described_by: location,
                }
            }
        };
        open_first(self.disk, [candidate], self.notes)
    }

    fn note(&mut self, location: &Location, item: &Item, reason: &str) {
        let location = self.disk.describe_location(location);
        self.notes.add(format!("{location}: entry {:?} {reason}", item.title));
    }
}

/// Splits the first step off a default, such as `1>2`. `>>` stands for `>` in a title.
pub(super) fn split_default(default: &str) -> (String, &str) {
    let mut first = String::new();
    let mut characters = default.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if character == '>' && characters.next_if(|(_, next)| *next == '>').is_none() {
            return (first, &default[at + 1..]);
        }
        first.push(character);
    }
    (first, "")
}

/// Returns the position of the default item: by number, id or title. It is the first if there is no such item.
fn position(items: &[Item], default: &str) -> usize {
    let by_number = default.parse::<usize>().ok();
    let by_name = || {
        items
            .iter()
            .position(|item| item.id == default || item.title == default)
    };
    by_number.or_else(by_name).filter(|at| *at < items.len()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_split_at_single_signs() {
        for (default, first, rest) in [
            ("0", "0", ""),
            ("1>2", "1", "2"),
            ("a>b>c", "a", "b>c"),
            ("a>>b>c", "a>b", "c"),
            ("", "", ""),
            (">", "", ""),
        ] {
            assert_eq!(split_default(default), (first.to_owned(), rest), "{default}");
        }
    }
}
