//! Plans the root file system from the mounts of a snapshotter. [`layers`] plans one that is assembled from layers,
//! which are file systems in files.

mod layers;
mod mount_rules;
mod template;

use std::path::{Path, PathBuf};

pub(crate) use self::layers::MAX_ROOT_FILES;
use self::mount_rules::{
    GUEST_FILESYSTEMS, SNAPSHOTTER_REMEDY, guest_options, is_read_only, is_read_only_disk, unsupported_type,
};
use crate::oci::{HostFiles, HostMount, IdMap, PlanError, Root, RootDisk};

/// File systems that the host mounts and shares as a directory. `overlay` and `bind` come from snapshotters like
/// overlayfs, native and remote ones; the guest's kernel lacks the others.
const HOST_FILESYSTEMS: [&str; 5] = ["bind", "btrfs", "overlay", "xfs", "zfs"];

/// Plans the root from `mounts`. Without mounts, `directory` (the spec's `root.path`) is the root itself.
pub(super) fn plan_root(mounts: &[HostMount], directory: PathBuf) -> Result<Root, PlanError> {
    for mount in mounts {
        check_options(mount)?;
    }
    match mounts {
        [] => Ok(Root::Share {
            files: HostFiles::Directory(directory),
            read_only: false,
        }),
        mounts if layers::are_layers(mounts) => layers::plan_layers(mounts),
        [mount] if GUEST_FILESYSTEMS.contains(&mount.kind.as_str()) => plan_disk(mount),
        mounts => match mounts.iter().find(|mount| !is_host_mount(mount)) {
            None => Ok(Root::Share {
                files: HostFiles::Mounts(mounts.to_vec()),
                read_only: mounts.last().is_some_and(is_read_only),
            }),
            Some(mount) => Err(unsupported_type(mount)),
        },
    }
}

fn check_options(mount: &HostMount) -> Result<(), PlanError> {
    let field = |option: &str| format!("rootfs mount of type {:?}: option {option:?}", mount.kind);
    for option in &mount.options {
        let name = option.split('=').next().unwrap_or_default();
        match name {
            "uidmap" | "gidmap" => {
                // A mount of another type contains only this container's files, so the snapshotter changes their owners
                // instead of mapping them.
                if !mount.kind.ends_with("overlay") && mount.kind != "bind" {
                    let reason = "only overlay and bind mounts can map ids";
                    return Err(PlanError::unsupported(field(option), reason));
                }
                IdMap::from_options(&mount.options).map_err(|reason| PlanError::invalid(field(option), reason))?;
            }
            _ if name.starts_with("X-containerd.dmverity") => {
                return Err(PlanError::unsupported(
                    field(option),
                    format!("dm-verity is not supported. {SNAPSHOTTER_REMEDY}"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn plan_disk(mount: &HostMount) -> Result<Root, PlanError> {
    if !Path::new(&mount.source).is_absolute() {
        return Err(PlanError::invalid(
            format!("rootfs mount of type {:?}", mount.kind),
            format!("source {:?} is not an absolute path", mount.source),
        ));
    }
    Ok(Root::Disk(RootDisk::FileSystem {
        source: PathBuf::from(&mount.source),
        filesystem: mount.kind.clone(),
        options: guest_options(mount, &mount.kind),
        read_only: is_read_only_disk(mount, &mount.kind),
    }))
}

fn is_host_mount(mount: &HostMount) -> bool {
    HOST_FILESYSTEMS.contains(&mount.kind.as_str()) || mount.kind.starts_with("fuse.")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn mount(kind: &str, source: &str, options: &[&str]) -> HostMount {
        HostMount {
            kind: kind.to_owned(),
            source: source.to_owned(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn plan(mounts: &[HostMount]) -> Result<Root, PlanError> {
        plan_root(mounts, PathBuf::from("/bundle/rootfs"))
    }

    #[test]
    fn mounts_of_directories_are_shared() {
        let overlay = mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/s/2/work", "upperdir=/s/2/fs", "lowerdir=/s/1/fs"],
        );
        for (mounts, read_only) in [
            (vec![overlay.clone()], false),
            (vec![mount("bind", "/s/1/fs", &["rw", "rbind"])], false),
            (vec![mount("bind", "/s/1/fs", &["ro", "rbind"])], true),
            (
                vec![mount("overlay", "overlay", &["uidmap=0:1000:1", "gidmap=0:1000:1"])],
                false,
            ),
            (vec![mount("xfs", "/dev/mapper/p-snap-1", &["nouuid"])], false),
            (vec![mount("btrfs", "/dev/sdb", &["subvolid=5", "ro"])], true),
            (vec![mount("fuse.nydus-overlayfs", "overlay", &["lowerdir=/a"])], false),
            (vec![mount("bind", "/s/1/fs", &["ro", "rbind"]), overlay], false),
        ] {
            let root = plan(&mounts).unwrap();
            let expected = Root::Share {
                files: HostFiles::Mounts(mounts),
                read_only,
            };
            assert_eq!(root, expected);
        }
    }

    /// In another runtime, the root of an image without layers was found to be a block device of the host, which the
    /// guest then got. Here the type of the mount decides, and no file of the host is looked at.
    #[test]
    fn bind_mount_and_directory_are_never_a_disk_cve_2026_24054() {
        for source in ["/dev/sda", "/dev/mapper/root", "/dev/loop0", "/disk.img", ""] {
            let mounts = vec![mount("bind", source, &["rbind", "rw"])];
            let root = plan(&mounts).unwrap();
            let expected = Root::Share {
                files: HostFiles::Mounts(mounts),
                read_only: false,
            };
            assert_eq!(root, expected);
            let root = plan_root(&[], PathBuf::from(source)).unwrap();
            let expected = Root::Share {
                files: HostFiles::Directory(PathBuf::from(source)),
                read_only: false,
            };
            assert_eq!(root, expected);
        }
    }

    #[test]
    fn directory_of_the_spec_is_shared_without_mounts() {
        let expected = Root::Share {
            files: HostFiles::Directory(PathBuf::from("/bundle/rootfs")),
            read_only: false,
        };
        assert_eq!(plan(&[]).unwrap(), expected);
    }

    #[test]
    fn devices_and_images_become_disks_with_options_for_the_guest() {
        let cases = [
            ("ext4", "/dev/mapper/pool-snap-7", "", "", false),
            ("ext4", "/b/snap", "loop sync", "sync", false),
            ("ext4", "/b/snap", "ro loop noatime", "noatime ro", true),
            ("ext2", "/b/snap", "ro rw X-containerd.mkfs.fs=ext2", "", false),
            ("erofs", "/e/layer.erofs", "loop", "ro", true),
        ];
        for (kind, source, options, expected, read_only) in cases {
            let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
            let root = plan(&[mount(kind, source, &words(options))]).unwrap();
            let expected = Root::Disk(RootDisk::FileSystem {
                source: PathBuf::from(source),
                filesystem: kind.to_owned(),
                options: words(expected).into_iter().map(str::to_owned).collect(),
                read_only,
            });
            assert_eq!(root, expected);
        }
    }

    #[test]
    fn unsupported_mount_is_an_error_that_names_it() {
        let overlay = mount("overlay", "overlay", &["lowerdir=/a:/b"]);
        for (mounts, named) in [
            (vec![mount("ntfs", "/dev/sdb", &[])], "ntfs"),
            (
                vec![mount("format/mkdir/overlay", "overlay", &[])],
                "format/mkdir/overlay",
            ),
            (vec![mount("erofs", "/a", &["ro"]), overlay], "lowerdir=/a:/b"),
            (
                vec![mount("erofs", "/a", &["X-containerd.dmverity.roothash=1"])],
                "dmverity",
            ),
            (vec![mount("overlay", "overlay", &["uidmap=0:1000:1"])], "uidmap"),
            (
                vec![mount("xfs", "/dev/sdb", &["uidmap=0:1000:1", "gidmap=0:1000:1"])],
                "uidmap",
            ),
            (vec![mount("ext4", "snap.img", &["loop"])], "snap.img"),
        ] {
            let error = plan(&mounts).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn error_of_an_unsupported_mount_names_the_snapshotter_setting() {
        for mounts in [
            vec![mount("format/mkdir/xfs", "/dev/sdb", &[])],
            vec![mount("ntfs", "/dev/sdb", &[])],
            vec![
                mount("erofs", "/a", &["ro"]),
                mount("overlay", "overlay", &["lowerdir=/a:/b"]),
            ],
            vec![mount("erofs", "/a", &["X-containerd.dmverity.roothash=1"])],
        ] {
            let error = plan(&mounts).unwrap_err().to_string();
            assert!(error.contains("snapshotter = \"overlayfs\""), "{error}");
        }
    }
}
