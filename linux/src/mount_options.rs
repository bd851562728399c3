//! The mount options that are flags of mount(2) rather than data for the file system (mount(8),
//! "FILESYSTEM-INDEPENDENT MOUNT OPTIONS").

use rustix::mount::MountFlags;

/// Applies one fstab-style option to `flags`: `ro` sets a flag, `rw` clears it, `defaults` changes nothing. The
/// last of several contradicting options wins, as with mount(8).
///
/// Returns `false` and does not change `flags` if the option is for the file system or the mount program.
pub fn apply(option: &str, flags: &mut MountFlags) -> bool {
    let (flag, value) = match option {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "lazytime" => (MountFlags::LAZYTIME, true),
        "nolazytime" => (MountFlags::LAZYTIME, false),
        "silent" => (MountFlags::SILENT, true),
        "loud" => (MountFlags::SILENT, false),
        "defaults" => return true,
        _ => return false,
    };
    flags.set(flag, value);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags_of(options: &[&str]) -> MountFlags {
        let mut flags = MountFlags::empty();
        for option in options {
            assert!(apply(option, &mut flags), "{option}");
        }
        flags
    }

    #[test]
    fn option_that_clears_a_flag_undoes_the_one_that_sets_it() {
        for (set, clear, flag) in [
            ("ro", "rw", MountFlags::RDONLY),
            ("nosuid", "suid", MountFlags::NOSUID),
            ("nodev", "dev", MountFlags::NODEV),
            ("noexec", "exec", MountFlags::NOEXEC),
            ("sync", "async", MountFlags::SYNCHRONOUS),
            ("noatime", "atime", MountFlags::NOATIME),
            ("nodiratime", "diratime", MountFlags::NODIRATIME),
            ("relatime", "norelatime", MountFlags::RELATIME),
            ("strictatime", "nostrictatime", MountFlags::STRICTATIME),
            ("lazytime", "nolazytime", MountFlags::LAZYTIME),
            ("silent", "loud", MountFlags::SILENT),
        ] {
            assert_eq!(flags_of(&["dirsync", set]), MountFlags::DIRSYNC | flag, "{set}");
            assert_eq!(flags_of(&["dirsync", set, clear]), MountFlags::DIRSYNC, "{clear}");
        }
    }

    #[test]
    fn defaults_change_nothing() {
        assert_eq!(flags_of(&["ro", "defaults"]), MountFlags::RDONLY);
    }

    #[test]
    fn other_options_are_left_to_the_file_system() {
        let mut flags = MountFlags::RDONLY;
        for option in ["discard", "data=ordered", "lowerdir=/a:/b", "rbind", ""] {
            assert!(!apply(option, &mut flags), "{option}");
        }
        assert_eq!(flags, MountFlags::RDONLY);
    }
}
