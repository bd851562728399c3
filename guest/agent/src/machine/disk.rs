//! Finds and releases virtio-blk devices by their disk slots, and divides them into partitions.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{DiskPart, FIRST_DISK_SLOT, disk_serial};

use super::slot;
use crate::sys;

/// The unit of sizes in sysfs, in bytes.
const SECTOR_SIZE: u64 = 512;

/// Returns the device node of the disk in disk slot `slot`. Binds the driver first if the disk was added after boot.
pub(crate) fn find(slot: u32) -> io::Result<PathBuf> {
    let serial = disk_serial(slot);
    if let Some(device) = find_by_serial(slot, &serial) {
        return Ok(device);
    }
    slot::bind(FIRST_DISK_SLOT.saturating_add(slot))?;
    find_by_serial(slot, &serial).ok_or_else(|| {
        let text = format!("no disk has the serial {serial}");
        io::Error::new(io::ErrorKind::NotFound, text)
    })
}

/// Makes each of `parts` a partition of `disk`, a device node, and returns the nodes of the partitions. Nothing is
/// written to the disk, which needs no partition table. Partitions that exist already are kept.
pub(crate) fn divide(disk: &Path, parts: &[DiskPart]) -> io::Result<Vec<PathBuf>> {
    let name = disk.file_name().unwrap_or_default().to_string_lossy();
    let opened = fs::File::open(disk)?;
    let add = |(number, part): (i32, &DiskPart)| {
        let partition = format!("{name}{number}");
        let exists = read_extent(&Path::new("/sys/block").join(&*name).join(&partition)) == Some(*part);
        if !exists {
            sys::add_partition(&opened, number, part.start, part.length)?;
        }
        Ok(Path::new("/dev").join(partition))
    };
    (1..).zip(parts).map(add).collect()
}

/// Reads where a partition is. `directory` is its folder in sysfs.
fn read_extent(directory: &Path) -> Option<DiskPart> {
    let bytes = |file: &str| {
        let text = fs::read_to_string(directory.join(file)).ok()?;
        text.trim_end().parse::<u64>().ok()?.checked_mul(SECTOR_SIZE)
    };
    Some(DiskPart {
        start: bytes("start")?,
        length: bytes("size")?,
    })
}

/// Unbinds the driver of the disk in disk slot `slot`. The disk must have been added after boot.
pub(crate) fn release(slot: u32) -> io::Result<()> {
    slot::unbind(FIRST_DISK_SLOT.saturating_add(slot))
}

fn find_by_serial(slot: u32, serial: &str) -> Option<PathBuf> {
    // The kernel usually names disks in the order of their slots. Reading a serial costs a request to the device, so
    // the most likely disk comes first.
    let likely = u8::try_from(slot)
        .ok()
        .filter(|slot| *slot < 26)
        .map(|slot| format!("vd{}", char::from(b'a' + slot)));
    let all = || {
        let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let name = likely
        .into_iter()
        .chain(all())
        .find(|name| read_serial(name).as_deref() == Some(serial))?;
    Some(Path::new("/dev").join(name))
}

fn read_serial(name: &str) -> Option<String> {
    let serial = fs::read_to_string(Path::new("/sys/block").join(name).join("serial")).ok()?;
    Some(serial.trim_end_matches(['\n', '\0']).to_owned())
}
