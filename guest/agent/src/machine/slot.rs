//! Bus slots into which the host plugs devices while the machine runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::slot_device_name;

/// The directory of the driver for virtio-mmio devices, with its `bind` and `unbind` files.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Whether the driver is bound to the device in `slot`.
pub(super) fn is_bound(slot: u32) -> bool {
    Path::new(DRIVER).join(slot_device_name(slot)).exists()
}

/// Unbinds the driver from the device in `slot`, so that the host can remove the device. Does nothing if it is not
/// bound.
pub(super) fn unbind(slot: u32) -> io::Result<()> {
    if !is_bound(slot) {
        return Ok(());
    }
    let name = slot_device_name(slot);
    fs::write(Path::new(DRIVER).join("unbind"), &name)
        .map_err(|error| io::Error::new(error.kind(), format!("unbind {name} from its driver: {error}")))
}

/// Binds the driver to the device in `slot`, which was empty at boot. Returns the device's directory in sysfs. When
/// this returns, the device's virtio driver has probed it.
pub(super) fn bind(slot: u32) -> io::Result<PathBuf> {
    let name = slot_device_name(slot);
    fs::write(Path::new(DRIVER).join("bind"), &name)
        .map_err(|error| io::Error::new(error.kind(), format!("bind {name} to its driver: {error}")))?;
    Ok(Path::new("/sys/bus/platform/devices").join(name))
}
