//! The virtio-blk devices of the machine's disk slots.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{FIRST_DISK_SLOT, disk_serial};

use super::slot;

/// The device node of the disk in disk slot `slot`: it was there when the machine booted, or it came since and
/// its driver has yet to look.
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

/// Lets go of the disk that [`find`] found in disk slot `slot`, which was empty when the machine booted.
pub(crate) fn release(slot: u32) -> io::Result<()> {
    slot::unbind(FIRST_DISK_SLOT.saturating_add(slot))
}

fn find_by_serial(slot: u32, serial: &str) -> Option<PathBuf> {
    // The kernel names disks in the order of slots as a rule, and asking a disk for its serial costs
    // a request: the likely one is asked first.
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
