//! Slots of the machine in which the host puts a device while it runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::slot_device_name;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Whether the driver has found the device in `slot`.
pub(super) fn is_bound(slot: u32) -> bool {
    Path::new(DRIVER).join(slot_device_name(slot)).exists()
}

/// Has the driver forget the device in `slot`, if it knows one: the host takes it away.
pub(super) fn unbind(slot: u32) -> io::Result<()> {
    if !is_bound(slot) {
        return Ok(());
    }
    let name = slot_device_name(slot);
    fs::write(Path::new(DRIVER).join("unbind"), &name)
        .map_err(|error| io::Error::new(error.kind(), format!("unbind {name} from its driver: {error}")))
}

/// Has the driver look at a slot again, which was empty when the machine booted; returns the device's folder.
/// What the device's own driver makes of it is there by then.
pub(super) fn bind(slot: u32) -> io::Result<PathBuf> {
    let name = slot_device_name(slot);
    fs::write(Path::new(DRIVER).join("bind"), &name)
        .map_err(|error| io::Error::new(error.kind(), format!("bind {name} to its driver: {error}")))?;
    Ok(Path::new("/sys/bus/platform/devices").join(name))
}
