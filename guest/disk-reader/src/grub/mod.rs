//! The menu of GRUB: a subset of its shell that the generated files of Debian, Ubuntu, Fedora, RHEL and openSUSE need.
//!
//! `script` parses a `grub.cfg`, `expression` evaluates its tests, `interpreter` executes it with the commands in
//! `commands`, `environment` reads `grubenv`, and `menu` chooses an entry. Nothing here writes: `save_env` has no
//! effect.

mod commands;
mod environment;
mod expression;
mod interpreter;
mod menu;
mod script;

pub(crate) use menu::Menu;

use crate::boot::Notes;
use crate::disk::{Disk, Location};
use crate::partitions::PartitionType;
use interpreter::Interpreter;

/// The configurations that the first stage of GRUB executes if the firmware is not EFI, on each file system.
const CONFIGURATIONS: [&str; 5] = [
    "/boot/grub2/grub.cfg",
    "/boot/grub/grub.cfg",
    "/grub2/grub.cfg",
    "/grub/grub.cfg",
    // The usual subvolume of btrfs for the root file system.
    "/@/boot/grub/grub.cfg",
];

/// How many configurations are executed. Disks have one, and one on the EFI system partition that includes it.
const MAX_CONFIGURATIONS: usize = 8;

/// Executes the configurations of a disk: those for EFI first. Returns the menus that have entries.
pub(crate) fn evaluate<'d>(disk: &'d Disk, notes: &mut Notes) -> Vec<Menu<'d>> {
    let mut menus: Vec<Menu<'d>> = Vec::new();
    for start in start_configurations(disk).into_iter().take(MAX_CONFIGURATIONS) {
        // A configuration for EFI usually continues with one of the others.
        if menus.iter().any(|menu| menu.location() == &start) {
            continue;
        }
        match Interpreter::run(disk, &start, notes).map(Menu::new) {
            Ok(menu) if menu.is_empty() => {
                notes.add(format!("{} has no menu entries", disk.describe_location(&start)));
            }
            Ok(menu) if menus.iter().any(|earlier| earlier.location() == menu.location()) => {}
            Ok(menu) => menus.push(menu),
            Err(reason) => notes.add(format!("{}: {reason}", disk.describe_location(&start))),
        }
    }
    menus
}

/// Returns the configurations with which GRUB may start, and which exist, in the order in which they are tried.
fn start_configurations(disk: &Disk) -> Vec<Location> {
    let mut starts = Vec::new();
    for file_system in disk.boot_order() {
        let about = &disk.file_systems()[file_system];
        if about.partition_type != PartitionType::EfiSystem && about.kind != "vfat" {
            continue;
        }
        let vendors = disk.list(&Location::new(file_system, "/EFI")).unwrap_or_default();
        // Firmware starts the program in `BOOT` only if no vendor has registered another.
        let (fallback, vendors): (Vec<_>, Vec<_>) = vendors
            .into_iter()
            .partition(|vendor| vendor.eq_ignore_ascii_case("BOOT"));
        let configurations = vendors.into_iter().chain(fallback);
        starts.extend(configurations.map(|vendor| Location::new(file_system, format!("/EFI/{vendor}/grub.cfg"))));
    }
    for file_system in 0..disk.file_systems().len() {
        starts.extend(CONFIGURATIONS.map(|path| Location::new(file_system, path)));
    }
    starts.retain(|start| disk.is_file(start));
    starts
}

/// Gives a text to each parser of this module.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_parts(text: &str) -> Result<(), String> {
    environment::parse(text);
    let words: Vec<_> = text.split_ascii_whitespace().map(str::to_owned).collect();
    expression::evaluate(&words, &|path, _| path.len() % 2 == 0);
    menu::split_default(text);
    script::parse(text).map(drop)
}
