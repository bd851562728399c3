//! Finds and releases virtio-blk devices by their disk slots.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{FIRST_DISK_SLOT, disk_serial};

use super::slot;

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
