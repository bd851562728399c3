//! Device nodes that are the same on the host and in the guest: Linux assigns their numbers permanently
//! (`Documentation/admin-guide/devices.txt`).

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType};

use crate::oci::PlanError;

/// Major and minor number, and path in the guest.
const CHARACTER_DEVICES: [(u32, u32, &str); 12] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 2, "/dev/ptmx"),
    (10, 183, "/dev/hwrng"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
    (10, 237, "/dev/loop-control"),
];

/// Loop devices: the guest's kernel creates them on demand.
const LOOP_MAJOR: i64 = 7;

const NO_SUCH_DEVICE: &str = "the virtual machine does not have this device of the host: remove it from the spec";

/// Without this setting, containerd's CRI adds all devices of the host to the spec of a privileged container.
const PRIVILEGED_REMEDY: &str =
    "set privileged_without_host_devices = true for this runtime in containerd's configuration";

/// The guest's path of the character device with these numbers.
pub(super) fn find_character_device(major: u32, minor: u32) -> Option<&'static str> {
    CHARACTER_DEVICES
        .iter()
        .find(|(known_major, known_minor, _)| (*known_major, *known_minor) == (major, minor))
        .map(|(_, _, path)| *path)
}

/// Refuses a spec with a device node whose numbers stand for another device in the guest, or for none. The spec of a
/// privileged container lists all devices of the host, so there such nodes are removed, with a warning.
pub(super) fn filter(linux: &mut Linux, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    let Some(devices) = linux.devices_mut().take() else {
        return Ok(());
    };
    let (known, unknown): (Vec<_>, Vec<_>) = devices.into_iter().partition(is_known);
    if let Some(device) = unknown.first() {
        if !is_privileged(linux) {
            return Err(PlanError::unsupported(
                format!("linux.devices: {}", device.path().display()),
                format!("{NO_SUCH_DEVICE}. For privileged containers, {PRIVILEGED_REMEDY}"),
            ));
        }
        warnings.push(format!(
            "linux.devices: removed {} of the spec's device nodes, such as {}, because the virtual machine does not have \
             these devices of the host. To avoid this warning, {PRIVILEGED_REMEDY}",
            unknown.len(),
            device.path().display()
        ));
    }
    linux.set_devices(Some(known));
    Ok(())
}

pub(super) fn is_known(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => u32::try_from(device.major())
            .ok()
            .zip(u32::try_from(device.minor()).ok())
            .is_some_and(|(major, minor)| find_character_device(major, minor).is_some()),
        LinuxDeviceType::B => device.major() == LOOP_MAJOR,
        LinuxDeviceType::A => false,
    }
}

/// containerd's clients write a rule that allows all devices for `--privileged`.
pub(super) fn is_privileged(linux: &Linux) -> bool {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_ref());
    rules.into_iter().flatten().any(|rule| {
        let is_any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        rule.allow() && is_any_type && rule.major().is_none() && rule.minor().is_none()
    })
}

/// The error for a device of the host that the machine does not have.
pub(super) fn no_such_device(field: &str) -> PlanError {
    PlanError::unsupported(field, NO_SUCH_DEVICE)
}
