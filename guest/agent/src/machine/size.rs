//! The machine's size: the host gives more memory and processors, or asks for some back, and here they are
//! taken into use.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nutshell_protocol::{Failure, MEMORY_SLOT};

use super::slot;
use crate::failure::Context;

const CPU_DIRECTORY: &str = "/sys/devices/system/cpu";

/// Added memory is for everything, or for what can be moved away again, as the kernel sees fit: three parts of
/// the second for one of what cannot be moved (`Documentation/admin-guide/mm/memory-hotplug.rst`).
const ONLINE_POLICY: [(&str, &str); 2] = [
    ("/sys/devices/system/memory/auto_online_blocks", "online"),
    ("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable"),
];

/// Has the kernel use `processors` of the processors, and look at the device for memory if there is one.
pub(crate) fn resize(vcpus: u32, has_memory_device: bool) -> Result<(), Failure> {
    if has_memory_device && !slot::is_bound(MEMORY_SLOT) {
        for (file, value) in ONLINE_POLICY {
            fs::write(file, value).context(|| format!("write {value} to {file}"))?;
        }
        slot::bind(MEMORY_SLOT).context(|| "find the device for memory".to_owned())?;
    }
    set_online_vcpus(Path::new(CPU_DIRECTORY), vcpus).context(|| format!("have {vcpus} processors in use"))
}

/// The first one is always in use, and has no switch.
fn set_online_vcpus(folder: &Path, count: u32) -> io::Result<()> {
    let switches: Vec<PathBuf> = (1_u32..)
        .map(|number| folder.join(format!("cpu{number}/online")))
        .take_while(|switch| switch.exists())
        .collect();
    for (number, switch) in (1..).zip(&switches) {
        let wanted = if number < count { "1" } else { "0" };
        if fs::read_to_string(switch)?.trim() != wanted {
            fs::write(switch, wanted)?;
        }
    }
    if switches.len() + 1 < count as usize {
        return Err(io::Error::other(format!("there are {}", switches.len() + 1)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors(states: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (number, state) in (1..).zip(states) {
            let processor = folder.path().join(format!("cpu{number}"));
            fs::create_dir(&processor).unwrap();
            fs::write(processor.join("online"), state).unwrap();
        }
        folder
    }

    #[test]
    fn as_many_processors_are_in_use_as_are_asked_for() {
        for (count, expected) in [(1, "0 0 0"), (2, "1 0 0"), (4, "1 1 1")] {
            let folder = processors(&["1\n", "0\n", "0\n"]);

            set_online_vcpus(folder.path(), count).unwrap();

            let states: Vec<_> = (1..4)
                .map(|number| fs::read_to_string(folder.path().join(format!("cpu{number}/online"))).unwrap())
                .collect();
            let states: Vec<_> = states.iter().map(|state| state.trim()).collect();
            assert_eq!(states.join(" "), expected);
        }
    }

    #[test]
    fn more_processors_than_there_are_is_an_error() {
        let folder = processors(&["0"]);
        let error = set_online_vcpus(folder.path(), 3).unwrap_err();
        assert_eq!(error.to_string(), "there are 2");
    }
}
