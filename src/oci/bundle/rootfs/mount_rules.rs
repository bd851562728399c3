//! Rules for one mount of a snapshotter, whether it is the only one or one of several layers: its file system, its
//! options in the guest, and whether it is read-only.

use crate::oci::{HostMount, PlanError};

/// File systems that the guest mounts from a disk.
pub(super) const GUEST_FILESYSTEMS: [&str; 4] = ["erofs", "ext2", "ext3", "ext4"];

/// The remedy for unsupported mounts: containerd's configuration or the client selects the snapshotter.
pub(super) const SNAPSHOTTER_REMEDY: &str = "Set snapshotter = \"overlayfs\" (or native, blockfile, devmapper) for this \
    runtime in containerd's configuration, or pass --snapshotter to ctr";

/// The options of a mount for mount(2) in the guest. `ro` and `rw` are replaced by one `ro` if the mount is read-only.
/// Options for the host are left out: `loop`, `device=` (another file of an EROFS layer), and `X-…` (for containerd's
/// mount manager).
pub(super) fn guest_options(mount: &HostMount, filesystem: &str) -> Vec<String> {
    let is_for_guest = |option: &&String| {
        let (name, _) = option.split_once('=').unwrap_or((option, ""));
        !matches!(name, "loop" | "rw" | "ro" | "device") && !name.starts_with("X-")
    };
    let options = mount.options.iter().filter(is_for_guest).cloned();
    options
        .chain(is_read_only_disk(mount, filesystem).then(|| "ro".to_owned()))
        .collect()
}

/// EROFS is read-only whatever the options are.
pub(super) fn is_read_only_disk(mount: &HostMount, filesystem: &str) -> bool {
    filesystem == "erofs" || is_read_only(mount)
}

/// The last of `ro` and `rw` wins, as with mount(8).
pub(super) fn is_read_only(mount: &HostMount) -> bool {
    let last = mount
        .options
        .iter()
        .rfind(|option| matches!(option.as_str(), "ro" | "rw"));
    last.is_some_and(|option| option == "ro")
}

pub(super) fn unsupported_type(mount: &HostMount) -> PlanError {
    PlanError::unsupported(
        format!("rootfs mount of type {:?}", mount.kind),
        format!("not supported. {SNAPSHOTTER_REMEDY}"),
    )
}
