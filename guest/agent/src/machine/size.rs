//! Adapts the guest to a new size of the machine: sets vCPUs online or offline, and binds the virtio-mem device.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{Failure, MEMORY_SLOT};

use super::slot;
use crate::failure::Context;

const CPU_DIRECTORY: &str = "/sys/devices/system/cpu";

/// The kernel's policy for added memory: set it online, in the zone that `auto-movable` selects. That policy keeps the
/// ratio of movable to unmovable memory at 3:1 or less (`Documentation/admin-guide/mm/memory-hotplug.rst`).
const ONLINE_POLICY: [(&str, &str); 2] = [
    ("/sys/devices/system/memory/auto_online_blocks", "online"),
    ("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable"),
];

/// Sets `vcpus` vCPUs online and the others offline. If `has_memory_device` is set, binds the virtio-mem driver unless
/// it is bound already.
pub(crate) fn resize(vcpus: u32, has_memory_device: bool) -> Result<(), Failure> {
    if has_memory_device && !slot::is_bound(MEMORY_SLOT) {
        for (file, value) in ONLINE_POLICY {
            fs::write(file, value).context(|| format!("write {value} to {file}"))?;
        }
        slot::bind(MEMORY_SLOT).context(|| "bind the virtio-mem device".to_owned())?;
    }
    set_online_vcpus(Path::new(CPU_DIRECTORY), vcpus).context(|| format!("set {vcpus} vCPUs online"))
}

/// Sets the first `count` vCPUs online and the others offline. vCPU 0 is always online and has no `online` file.
fn set_online_vcpus(cpu_directory: &Path, count: u32) -> io::Result<()> {
    let switches: Vec<PathBuf> = (1_u32..)
        .map(|number| cpu_directory.join(format!("cpu{number}/online")))
        .take_while(|switch| switch.exists())
        .collect();
    for (number, switch) in (1..).zip(&switches) {
        let wanted = if number < count { "1" } else { "0" };
        let failed =
            |error: io::Error, step| io::Error::new(error.kind(), format!("{step} {}: {error}", switch.display()));
        let current = fs::read_to_string(switch).map_err(|error| failed(error, "read".to_owned()))?;
        if current.trim() != wanted {
            fs::write(switch, wanted).map_err(|error| failed(error, format!("write {wanted} to")))?;
        }
    }
    if switches.len() + 1 < count as usize {
        let available = switches.len() + 1;
        return Err(io::Error::other(format!("the machine has only {available} vCPUs")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu_directory(states: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (number, state) in (1..).zip(states) {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), state).unwrap();
        }
        directory
    }

    #[test]
    fn requested_number_of_vcpus_is_online() {
        for (count, expected) in [(1, "0 0 0"), (2, "1 0 0"), (4, "1 1 1")] {
            let directory = cpu_directory(&["1\n", "0\n", "0\n"]);

            set_online_vcpus(directory.path(), count).unwrap();

            let states: Vec<_> = (1..4)
                .map(|number| fs::read_to_string(directory.path().join(format!("cpu{number}/online"))).unwrap())
                .collect();
            let states: Vec<_> = states.iter().map(|state| state.trim()).collect();
            assert_eq!(states.join(" "), expected);
        }
    }

    #[test]
    fn more_vcpus_than_the_machine_has_is_an_error() {
        let directory = cpu_directory(&["0"]);
        let error = set_online_vcpus(directory.path(), 3).unwrap_err();
        assert_eq!(error.to_string(), "the machine has only 2 vCPUs");
    }
}
