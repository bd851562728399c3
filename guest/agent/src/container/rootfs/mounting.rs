//! Mount options and unmounts, for roots of every kind.

use std::fs;
use std::io;
use std::path::Path;

use nutshell_linux::mount_options;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Splits fstab-style options into flags of mount(2) and data for the file system.
pub(super) fn split_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options {
        // `loop` has no effect: the disk is a block device already.
        if !option.is_empty() && option != "loop" && !mount_options::apply(option, &mut flags) {
            data.push(option.as_str());
        }
    }
    (flags, data.join(","))
}

/// Unmounts everything at `target`, and removes the directory. Succeeds if it does not exist.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // A process outside of the container uses the mount. The kernel unmounts it when that process ends.
            Err(Errno::BUSY) => rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_into_flags_and_data() {
        let options = [
            "ro",
            "noatime",
            "discard",
            "nodev",
            "dev",
            "loop",
            "nolazytime",
            "data=ordered",
        ]
        .map(str::to_owned);
        let (flags, data) = split_options(&options);
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(data, "discard,data=ordered");
    }
}
