//! Finds what the boot loader of a disk would boot: kernel, initrds and command line.
//!
//! The guest's agent calls this with the mounted file systems of a disk. Everything on the disk is hostile: no content
//! may make a function of this crate panic, run for a long time, or use much memory. Each parser has limits, which are
//! constants, and [`Disk`] limits the sum of all accesses. No file outside of the given root directories is opened.
//!
//! [`find_kernel`] tries these rules in order. Each is a module:
//!
//! 1. `uki`: unified kernel images on the EFI system partition.
//! 2. `entries`: entries of the Boot Loader Specification, as systemd-boot and GRUB's `blscfg` command read them.
//! 3. `grub`: the menu of a `grub.cfg`.
//! 4. `extlinux`: configurations of SYSLINUX and of U-Boot's distro boot.
//! 5. `newest`: the newest kernel in `/boot`.
//!
//! `disk` accesses files, `superblock` and `partitions` identify the file systems of a disk, `version` and `pattern`
//! compare names, and `boot` has the types that all rules use.

mod boot;
mod command_line;
mod disk;
mod entries;
mod extlinux;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod grub;
#[cfg(test)]
mod hostile;
mod newest;
mod partitions;
mod pattern;
mod superblock;
mod uki;
mod version;

pub use boot::{BootEntry, BootFile, MAX_INITRD_SIZE, MAX_INITRDS, MAX_KERNEL_SIZE, Rule, Source};
pub use command_line::MAX_COMMAND_LINE;
pub use disk::{Disk, FileSystem};
pub use partitions::{PartitionType, partition_types};
pub use superblock::{START_SIZE, Superblock, identify};

use boot::Notes;

/// Why no kernel was found. The text is one line of printable characters, at most [`MAX_ERROR_LENGTH`] bytes long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FindError(String);

/// The largest length of a [`FindError`]'s text, in bytes. It is part of an error of containerd.
pub const MAX_ERROR_LENGTH: usize = 2048;

/// Finds what the boot loader of `disk` would boot.
///
/// # Errors
///
/// [`FindError`] if no rule finds a kernel. The text lists the rules, the file systems, and what was found instead.
pub fn find_kernel(disk: &Disk) -> Result<BootEntry, FindError> {
    let mut notes = Notes::default();
    let entries = entries::collect(disk, &mut notes);
    if let Some(entry) = uki::find(disk, &entries, &mut notes) {
        return Ok(entry);
    }
    let menus = grub::evaluate(disk, &mut notes);
    if !entries.is_empty() {
        let found = menus
            .iter()
            .filter(|menu| menu.has_entries_of_specification())
            .find_map(|menu| menu.choose(disk, &mut notes))
            .or_else(|| entries::find(disk, &entries, menus.first().map(grub::Menu::variables), &mut notes));
        if let Some(entry) = found {
            return Ok(entry);
        }
    }
    menus
        .iter()
        .find_map(|menu| menu.choose(disk, &mut notes))
        .or_else(|| extlinux::find(disk, &mut notes))
        .or_else(|| newest::find(disk, &mut notes))
        .ok_or_else(|| error(disk, &notes))
}

fn error(disk: &Disk, notes: &Notes) -> FindError {
    let places = match disk.describe() {
        places if places.is_empty() => "no file system that can be mounted".to_owned(),
        places => places,
    };
    let found = match notes.to_string() {
        notes if notes.is_empty() => "none of them exists".to_owned(),
        notes => notes,
    };
    let text = format!(
        "no kernel found on the disk: looked for EFI/Linux/*.efi, loader/entries/*.conf, grub.cfg, extlinux.conf and \
         /boot/vmlinuz-* in {places}; found: {found}"
    );
    FindError(boot::printable(&text, MAX_ERROR_LENGTH))
}
