//! Bus slots into which the host plugs devices while the machine runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{slot_device_name, slot_pci_name};

/// The directory of the driver for virtio-mmio devices, with its `bind` and `unbind` files.
const MMIO_DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// The host bridge of a machine with a PCI bus.
const PCI_HOST_BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0";

/// Makes the kernel scan the PCI bus for new devices.
const PCI_RESCAN: &str = "/sys/bus/pci/rescan";

/// Whether a driver is bound to the device in `slot`.
pub(super) fn is_bound(slot: u32) -> bool {
    if has_pci_bus() {
        pci_device(slot).join("driver").exists()
    } else {
        Path::new(MMIO_DRIVER).join(slot_device_name(slot)).exists()
    }
}

/// Detaches the device in `slot` from the guest's kernel, so that the host can unplug it: unbinds a virtio-mmio device
/// from its driver, or removes a PCI device. Does nothing if no driver is bound.
pub(super) fn unbind(slot: u32) -> io::Result<()> {
    if !is_bound(slot) {
        return Ok(());
    }
    if has_pci_bus() {
        return write(&pci_device(slot).join("remove"), "1");
    }
    write(&Path::new(MMIO_DRIVER).join("unbind"), &slot_device_name(slot))
}

/// Binds the driver to the device that the host has plugged into `slot` since boot. Returns the device's directory in
/// sysfs. When this returns, the device's virtio driver has probed it.
pub(super) fn bind(slot: u32) -> io::Result<PathBuf> {
    if has_pci_bus() {
        write(Path::new(PCI_RESCAN), "1")?;
        let device = pci_device(slot);
        if !device.join("driver").exists() {
            let text = format!("no driver is bound to {}", device.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        return Ok(device);
    }
    let name = slot_device_name(slot);
    write(&Path::new(MMIO_DRIVER).join("bind"), &name)?;
    Ok(Path::new("/sys/bus/platform/devices").join(name))
}

fn has_pci_bus() -> bool {
    Path::new(PCI_HOST_BRIDGE).exists()
}

fn pci_device(slot: u32) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(slot_pci_name(slot))
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::write(file, text)
        .map_err(|error| io::Error::new(error.kind(), format!("write {text} to {}: {error}", file.display())))
}
