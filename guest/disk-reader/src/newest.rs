//! The newest kernel in `/boot`, for disks without a boot loader configuration that the other modules understand.

use std::cmp::Ordering;

use crate::boot::{BootEntry, Candidate, Notes, Rule, open_first};
use crate::disk::{Disk, FileSystem, Location, insert_sorted};
use crate::version;

/// Where kernels are: in `/boot`, or in the root of a file system that is mounted there.
const DIRECTORIES: [&str; 2] = ["/boot", ""];

const KERNEL_PREFIX: &str = "vmlinuz-";

/// How many kernels are tried.
const MAX_KERNELS: usize = 8;

/// The largest size of `/etc/fstab`, in bytes. It has a few lines.
const MAX_FSTAB: usize = 64 << 10;

/// Finds the newest kernel for which a root file system is known.
pub(crate) fn find(disk: &Disk, notes: &mut Notes) -> Option<BootEntry> {
    let mut kernels = Vec::new();
    for file_system in 0..disk.file_systems().len() {
        for directory in DIRECTORIES {
            let names = disk.list(&Location::new(file_system, directory)).unwrap_or_default();
            let versions = names.iter().filter_map(|name| name.strip_prefix(KERNEL_PREFIX));
            for version in versions {
                let kernel = (Location::new(file_system, directory), version.to_owned());
                insert_sorted(&mut kernels, kernel, |(_, left), (_, right)| newest_first(left, right));
                kernels.truncate(MAX_KERNELS);
            }
        }
    }
    let (first, _) = kernels.first()?;
    let Some(root) = find_root(disk, first.file_system) else {
        let directory = disk.describe_location(&Location::new(first.file_system, format!("{}/", first.path)));
        notes.add(format!(
            "there are kernels in {directory}, but no root file system: none has an os-release file and a UUID"
        ));
        return None;
    };
    let candidates = kernels
        .into_iter()
        .map(|(directory, version)| candidate(disk, &directory, &version, &root));
    open_first(disk, candidates, notes)
}

/// Compares two versions: the newest comes first, and rescue kernels last.
fn newest_first(left: &str, right: &str) -> Ordering {
    let is_rescue = |version: &str| version.contains("rescue");
    is_rescue(left)
        .cmp(&is_rescue(right))
        .then_with(|| version::compare(right, left))
}

fn candidate(disk: &Disk, directory: &Location, version: &str, root: &str) -> Candidate {
    let in_directory = |name: String| Location::new(directory.file_system, format!("{}/{name}", directory.path));
    let kernel = in_directory(format!("{KERNEL_PREFIX}{version}"));
    let initrds = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
        format!("initrd-{version}.img"),
    ];
    let initrd = initrds
        .map(in_directory)
        .into_iter()
        .find(|initrd| disk.is_file(initrd));
    Candidate {
        kernel: kernel.clone().into(),
        initrds: initrd.into_iter().map(Into::into).collect(),
        command_line: format!("{root} ro"),
        rule: Rule::NewestKernel,
        described_by: kernel,
    }
}

/// Returns the arguments for the root file system: the one with the kernel, or else the first with an os-release file.
fn find_root(disk: &Disk, kernel_file_system: usize) -> Option<String> {
    let has_release = |at: &usize| {
        let paths = ["/etc/os-release", "/usr/lib/os-release"];
        paths.iter().any(|path| disk.is_file(&Location::new(*at, *path)))
    };
    let all = 0..disk.file_systems().len();
    [kernel_file_system]
        .into_iter()
        .chain(all)
        .filter(has_release)
        .find_map(|at| {
            let fstab = disk
                .read_text(&Location::new(at, "/etc/fstab"), MAX_FSTAB)
                .unwrap_or_default();
            root_of_fstab(&fstab).or_else(|| root_by_uuid(&disk.file_systems()[at]))
        })
}

fn root_by_uuid(file_system: &FileSystem) -> Option<String> {
    file_system.uuid.as_ref().map(|uuid| format!("root=UUID={uuid}"))
}

/// Returns the arguments for the root file system in an fstab(5). Names such as /dev/sda1 are ignored: a device has
/// another name in the virtual machine.
fn root_of_fstab(fstab: &str) -> Option<String> {
    fstab.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (source, target) = (fields.next()?, fields.next()?);
        let options = fields.nth(1).unwrap_or_default();
        let prefixes = [
            "UUID=",
            "LABEL=",
            "PARTUUID=",
            "PARTLABEL=",
            "/dev/disk/by-",
            "/dev/mapper/",
        ];
        let is_stable = prefixes.iter().any(|prefix| source.starts_with(prefix));
        if target != "/" || !is_stable || source.contains('"') {
            return None;
        }
        let subvolume = options.split(',').find(|option| option.starts_with("subvol="));
        let flags = subvolume.map(|subvolume| format!(" rootflags={subvolume}"));
        Some(format!("root={source}{}", flags.unwrap_or_default()))
    })
}

/// Gives a text to the parser of this module.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_parts(text: &str) {
    root_of_fstab(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_read_from_fstab() {
        for (fstab, expected) in [
            ("# /etc/fstab\nUUID=12 / ext4 defaults 0 1\n", Some("root=UUID=12")),
            ("PARTUUID=12 / ext4\n", Some("root=PARTUUID=12")),
            (
                "UUID=1 / btrfs subvol=root,compress=zstd:1 0 0",
                Some("root=UUID=1 rootflags=subvol=root"),
            ),
            (
                "LABEL=BOOT /boot ext4 defaults 0 0\n/dev/vda1 / ext4 defaults 0 1",
                None,
            ),
            ("", None),
        ] {
            assert_eq!(root_of_fstab(fstab).as_deref(), expected, "{fstab:?}");
        }
    }
}
