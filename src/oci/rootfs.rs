//! The snapshotter's mounts to a [`Root`].

use std::path::{Path, PathBuf};

use super::{HostMount, IdMap, PlanError, Root};

/// File systems that the guest's kernel mounts from a disk.
const GUEST_FILESYSTEMS: [&str; 4] = ["erofs", "ext2", "ext3", "ext4"];

/// What the host mounts and shares as a directory: `overlay` and `bind` come from snapshotters
/// (overlayfs, native and their remote kin), the others are file systems that the guest lacks.
const HOST_FILESYSTEMS: [&str; 5] = ["bind", "btrfs", "overlay", "xfs", "zfs"];

/// Who decides on the mounts is containerd's configuration, or the client.
const OTHER_SNAPSHOTTER: &str = "Set snapshotter = \"overlayfs\" (or native, blockfile, devmapper) for this runtime \
    in containerd's configuration, or give ctr --snapshotter";

/// `directory` is `root.path` of the spec: the root itself where the snapshotter gave no mounts.
pub(super) fn root(mounts: &[HostMount], directory: PathBuf) -> Result<Root, PlanError> {
    for mount in mounts {
        check(mount)?;
    }
    match mounts {
        [] => Ok(Root::Share {
            mounts: Vec::new(),
            directory: Some(directory),
            read_only: false,
        }),
        [mount] if GUEST_FILESYSTEMS.contains(&mount.kind.as_str()) => disk(mount),
        mounts => match mounts.iter().find(|mount| !is_host_mount(mount)) {
            None => Ok(Root::Share {
                mounts: mounts.to_vec(),
                directory: None,
                read_only: mounts.last().is_some_and(is_read_only),
            }),
            Some(mount) => Err(unknown(mount)),
        },
    }
}

fn check(mount: &HostMount) -> Result<(), PlanError> {
    let field = |option: &str| format!("rootfs mount of type {:?}: option {option:?}", mount.kind);
    for option in &mount.options {
        let name = option.split('=').next().unwrap_or_default();
        match name {
            "uidmap" | "gidmap" => {
                // Mounts of other types hold the files of this container alone, whose owners are
                // changed where they are to be mapped.
                if !matches!(mount.kind.as_str(), "overlay" | "bind") {
                    let reason = "ids of the host's files are mapped by overlay and bind mounts only";
                    return Err(PlanError::unsupported(field(option), reason));
                }
                IdMap::from_options(&mount.options).map_err(|reason| PlanError::invalid(field(option), reason))?;
            }
            "device" if mount.kind == "erofs" => {
                return Err(PlanError::unsupported(
                    field(option),
                    format!("merged EROFS layers are not supported yet. {OTHER_SNAPSHOTTER}"),
                ));
            }
            _ if name.starts_with("X-containerd.dmverity") => {
                return Err(PlanError::unsupported(
                    field(option),
                    format!("dm-verity is not supported yet. {OTHER_SNAPSHOTTER}"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn disk(mount: &HostMount) -> Result<Root, PlanError> {
    if !Path::new(&mount.source).is_absolute() {
        return Err(PlanError::invalid(
            format!("rootfs mount of type {:?}", mount.kind),
            format!("source {:?} is not an absolute path", mount.source),
        ));
    }
    // An EROFS image has no way to be written, whatever its options say.
    let read_only = mount.kind == "erofs" || is_read_only(mount);
    let options = mount
        .options
        .iter()
        .filter(|option| !matches!(option.as_str(), "loop" | "rw" | "ro") && !option.starts_with("X-"))
        .cloned()
        .chain(read_only.then(|| "ro".to_owned()))
        .collect();
    Ok(Root::Disk {
        source: PathBuf::from(&mount.source),
        filesystem: mount.kind.clone(),
        options,
        read_only,
    })
}

fn is_host_mount(mount: &HostMount) -> bool {
    HOST_FILESYSTEMS.contains(&mount.kind.as_str()) || mount.kind.starts_with("fuse.")
}

/// As mount(8): the last of `ro` and `rw` counts.
fn is_read_only(mount: &HostMount) -> bool {
    let last = mount
        .options
        .iter()
        .rfind(|option| matches!(option.as_str(), "ro" | "rw"));
    last.is_some_and(|option| option == "ro")
}

fn unknown(mount: &HostMount) -> PlanError {
    PlanError::unsupported(
        format!("rootfs mount of type {:?}", mount.kind),
        format!("not supported. {OTHER_SNAPSHOTTER}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> HostMount {
        HostMount {
            kind: kind.to_owned(),
            source: source.to_owned(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn planned(mounts: &[HostMount]) -> Result<Root, PlanError> {
        root(mounts, PathBuf::from("/bundle/rootfs"))
    }

    #[test]
    fn directory_trees_are_shared() {
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
            let root = planned(&mounts).unwrap();
            let expected = Root::Share {
                mounts,
                directory: None,
                read_only,
            };
            assert_eq!(root, expected);
        }
    }

    #[test]
    fn no_mounts_share_the_directory_of_the_spec() {
        let expected = Root::Share {
            mounts: Vec::new(),
            directory: Some(PathBuf::from("/bundle/rootfs")),
            read_only: false,
        };
        assert_eq!(planned(&[]).unwrap(), expected);
    }

    #[test]
    fn devices_and_images_become_disks_with_the_options_that_a_guest_knows() {
        let cases = [
            ("ext4", "/dev/mapper/pool-snap-7", "", "", false),
            ("ext4", "/b/snap", "loop sync", "sync", false),
            ("ext4", "/b/snap", "ro loop noatime", "noatime ro", true),
            ("ext2", "/b/snap", "ro rw X-containerd.mkfs.fs=ext2", "", false),
            ("erofs", "/e/layer.erofs", "loop", "ro", true),
        ];
        for (kind, source, options, expected, read_only) in cases {
            let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
            let root = planned(&[mount(kind, source, &words(options))]).unwrap();
            let expected = Root::Disk {
                source: PathBuf::from(source),
                filesystem: kind.to_owned(),
                options: words(expected).into_iter().map(str::to_owned).collect(),
                read_only,
            };
            assert_eq!(root, expected);
        }
    }

    #[test]
    fn what_neither_host_nor_guest_mounts_is_an_error_that_names_it() {
        let overlay = mount("overlay", "overlay", &["lowerdir=/a:/b"]);
        for (mounts, named) in [
            (vec![mount("ntfs", "/dev/sdb", &[])], "ntfs"),
            (
                vec![mount("format/mkdir/overlay", "overlay", &[])],
                "format/mkdir/overlay",
            ),
            (vec![mount("erofs", "/a", &["ro"]), overlay], "erofs"),
            (vec![mount("erofs", "/a", &["ro", "device=/b"])], "device=/b"),
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
            let error = planned(&mounts).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn what_another_snapshotter_would_do_is_an_error_that_says_where_it_is_named() {
        for mounts in [
            vec![mount("format/mkdir/overlay", "overlay", &[])],
            vec![mount("ntfs", "/dev/sdb", &[])],
            vec![mount("erofs", "/a", &["ro", "device=/b"])],
            vec![mount("erofs", "/a", &["X-containerd.dmverity.roothash=1"])],
        ] {
            let error = planned(&mounts).unwrap_err().to_string();
            assert!(error.contains("snapshotter = \"overlayfs\""), "{error}");
        }
    }
}
