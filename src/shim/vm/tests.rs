//! Files of volumes as disks.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use super::{
    disk::ImageRoot,
    seed::tests::publish,
    volumes::{self, OpenedDisk},
};
use crate::{
    control::BaseFormat,
    oci::{DiskContent, DiskSource, FileUser, HostFiles, VmDisk, VmImage},
};

const OTHER: FileUser = FileUser {
    uid: 1234,
    gid: 1234,
    additional_gids: Vec::new(),
};

fn image_root(directory: &TempDir) -> ImageRoot {
    let image = VmImage(HostFiles::Directory(directory.path().to_owned()));
    ImageRoot::mount(&image, directory.path()).unwrap()
}

fn disk(path: &Path, content: DiskContent) -> VmDisk {
    VmDisk {
        name: "data".parse().unwrap(),
        source: DiskSource::Volume {
            path: path.to_owned(),
            content,
            is_read_only: false,
        },
        read_only: false,
        is_boot_disk: false,
    }
}

fn open(path: &Path, content: DiskContent, user: &FileUser) -> Result<OpenedDisk, String> {
    let snapshot = tempfile::tempdir().unwrap();
    volumes::open(&disk(path, content), &image_root(&snapshot), user).map_err(|error| error.to_string())
}

fn volume(files: &[&str]) -> TempDir {
    let volume = tempfile::tempdir().unwrap();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for file in files {
        let path = volume.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [0; 512]).unwrap();
    }
    volume
}

#[test]
fn content_of_a_volume_decides_how_it_is_a_disk() {
    for (files, content, expected) in [
        (
            &["disk.img", "lost+found/x"][..],
            DiskContent::Detected,
            Some("disk.img"),
        ),
        (&["disk/fedora.qcow2", "README"], DiskContent::Detected, None),
        (&["fedora.qcow2"], DiskContent::Detected, None),
        (&["disk.img"], DiskContent::Ephemeral, None),
        (&[], DiskContent::Blank { size: 1 << 20 }, Some("disk.img")),
    ] {
        let volume = volume(files);
        match (open(volume.path(), content, &FileUser::default()).unwrap(), expected) {
            (OpenedDisk::Raw { path, read_only, .. }, Some(name)) => {
                assert_eq!((path, read_only), (volume.path().join(name), false));
            }
            (OpenedDisk::Image { .. }, None) => {}
            (opened, _) => panic!("{files:?}: {opened:?}"),
        }
    }
}

/// Only the link to the current version distinguishes such a volume from an image volume with one file.
#[test]
fn volume_with_the_kubelets_link_is_a_disk_with_its_keys() {
    for keys in [&["settings"][..], &["disk", "a"], &["disk.img"], &[]] {
        let volume = volume(&[]);
        let keys: Vec<_> = keys.iter().map(|key| (*key, "value")).collect();
        publish(volume.path(), "..2026", &keys);
        match open(volume.path(), DiskContent::Detected, &OTHER).unwrap() {
            OpenedDisk::Raw { file, read_only, .. } => {
                assert!(read_only);
                let mut sector = [0; 512];
                file.read_exact_at(&mut sector, 0).unwrap();
                assert_eq!((&sector[43..54], &sector[54..59]), (&b"DATA       "[..], &b"FAT12"[..]));
            }
            opened @ OpenedDisk::Image { .. } => panic!("{keys:?}: {opened:?}"),
        }
        for content in [DiskContent::Ephemeral, DiskContent::Blank { size: 1 << 20 }] {
            let error = open(volume.path(), content, &OTHER).unwrap_err();
            assert!(error.contains("disk data: a Secret or ConfigMap is always"), "{error}");
        }
    }
    // A raw disk stays one.
    let volume = volume(&["disk.img"]);
    publish(volume.path(), "..2026", &[("key", "value")]);
    let opened = open(volume.path(), DiskContent::Detected, &FileUser::default()).unwrap();
    assert!(
        matches!(&opened, OpenedDisk::Raw { path, read_only: false, .. } if path.ends_with("disk.img")),
        "{opened:?}"
    );
}

#[test]
fn keys_of_a_disk_are_opened_with_the_permissions_of_the_containers_user() {
    let volume = volume(&[]);
    publish(volume.path(), "..2026", &[("secret", "value")]);
    let key = volume.path().join("..2026/secret");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
    let error = open(volume.path(), DiskContent::Detected, &OTHER).unwrap_err();
    assert!(error.contains("cannot open the key \"secret\" in"), "{error}");
    chown(&key, Some(OTHER.uid), None).unwrap();
    open(volume.path(), DiskContent::Detected, &OTHER).unwrap();
}

#[test]
fn volume_may_be_the_file_itself() {
    let volume = volume(&["my-disk.raw"]);
    let path = volume.path().join("my-disk.raw");
    let opened = open(&path, DiskContent::Detected, &FileUser::default()).unwrap();
    assert!(matches!(opened, OpenedDisk::Raw { path: opened, .. } if opened == path));
}

#[test]
fn blank_disk_keeps_its_content_and_size() {
    let volume = volume(&[]);
    let blank = |size| open(volume.path(), DiskContent::Blank { size }, &FileUser::default()).unwrap();
    drop(blank(1 << 20));
    let path = volume.path().join("disk.img");
    fs::write(&path, [7; 1024]).unwrap();
    drop(blank(2 << 20));
    assert_eq!(fs::read(&path).unwrap(), [7; 1024]);
}

/// A shim that ended between the creation of the file and the change of its size has left an empty file.
#[test]
fn empty_blank_disk_gets_its_size() {
    let volume = volume(&[]);
    let path = volume.path().join("disk.img");
    fs::write(&path, "").unwrap();
    drop(
        open(
            volume.path(),
            DiskContent::Blank { size: 1 << 20 },
            &FileUser::default(),
        )
        .unwrap(),
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn disk_is_opened_with_the_permissions_of_the_containers_user_ghsa_46xp_26xh_hpqh() {
    let volume = volume(&["disk.img"]);
    let path = volume.path().join("disk.img");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();

    let error = open(volume.path(), DiskContent::Detected, &OTHER).unwrap_err();
    assert!(
        error.contains("cannot be opened by the user 1234 and group 1234"),
        "{error}"
    );

    chown(&path, Some(OTHER.uid), None).unwrap();
    open(volume.path(), DiskContent::Detected, &OTHER).unwrap();
    // A group of the user is enough, as with fsGroup.
    chown(&path, Some(0), Some(77)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
    let user = FileUser {
        additional_gids: vec![77],
        ..OTHER
    };
    open(volume.path(), DiskContent::Detected, &user).unwrap();
    // The ids of this thread have not changed.
    fs::write(&path, [0; 512]).unwrap();

    // A disk that may be created is not an exception, whether it exists or not.
    let blank = |volume: &TempDir| open(volume.path(), DiskContent::Blank { size: 1 << 20 }, &OTHER);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let empty = self::volume(&[]);
    for volume in [&volume, &empty] {
        let error = blank(volume).unwrap_err();
        assert!(error.contains("cannot be opened by the user 1234"), "{error}");
    }
    chown(empty.path(), Some(OTHER.uid), None).unwrap();
    blank(&empty).unwrap();
    let created = fs::metadata(empty.path().join("disk.img")).unwrap();
    assert_eq!((created.uid(), created.gid()), (OTHER.uid, OTHER.gid));
}

#[test]
fn read_only_disk_is_opened_without_write_access_cve_2020_28914() {
    for (by_disk, by_mount) in [(true, false), (false, true), (false, false)] {
        let (volume, snapshot) = (volume(&["disk.img"]), tempfile::tempdir().unwrap());
        let disk = VmDisk {
            read_only: by_disk,
            source: DiskSource::Volume {
                path: volume.path().to_owned(),
                content: DiskContent::Detected,
                is_read_only: by_mount,
            },
            ..disk(volume.path(), DiskContent::Detected)
        };
        let opened = volumes::open(&disk, &image_root(&snapshot), &FileUser::default()).unwrap();
        let OpenedDisk::Raw { file, read_only, .. } = opened else {
            panic!("{opened:?}");
        };
        let expected = (by_disk || by_mount).then_some(libc::EBADF);
        let written = file.write_all_at(b"guest", 0);
        assert_eq!(written.err().and_then(|error| error.raw_os_error()), expected);
        assert_eq!(read_only, expected.is_some());
    }
}

#[test]
fn image_in_a_volume_is_opened_with_the_permissions_of_the_containers_user() {
    let volume = volume(&["disk/debian.raw"]);
    let path = volume.path().join("disk/debian.raw");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let error = open(volume.path(), DiskContent::Detected, &OTHER).unwrap_err();
    assert!(error.contains("Permission denied"), "{error}");
    chown(&path, Some(OTHER.uid), None).unwrap();
    open(volume.path(), DiskContent::Detected, &OTHER).unwrap();
}

#[test]
fn disk_in_use_is_refused_unless_all_machines_only_read_it() {
    const WRITE: (DiskContent, bool) = (DiskContent::Detected, false);
    const READ: (DiskContent, bool) = (DiskContent::Detected, true);
    const EPHEMERAL: (DiskContent, bool) = (DiskContent::Ephemeral, false);
    const USED: Option<&str> = Some("another virtual machine uses it");
    const WRITTEN: Option<&str> = Some("another virtual machine writes it");
    for (file, first, second, expected) in [
        ("disk.img", WRITE, WRITE, USED),
        ("disk.img", EPHEMERAL, WRITE, USED),
        ("disk.img", READ, WRITE, USED),
        ("disk.img", WRITE, EPHEMERAL, WRITTEN),
        ("disk.img", WRITE, READ, WRITTEN),
        ("disk.img", EPHEMERAL, EPHEMERAL, None),
        ("disk.img", READ, EPHEMERAL, None),
        ("debian.raw", WRITE, WRITE, None),
    ] {
        let volume = volume(&[file]);
        let open = |(content, read_only)| {
            let snapshot = tempfile::tempdir().unwrap();
            let disk = VmDisk {
                read_only,
                ..disk(volume.path(), content)
            };
            volumes::open(&disk, &image_root(&snapshot), &FileUser::default()).map_err(|error| error.to_string())
        };
        let opened = open(first).unwrap();
        match (open(second), expected) {
            (Ok(_), None) => {}
            (Err(error), Some(expected)) => {
                let path = volume.path().join(file);
                let expected = format!("disk data: {} is locked: {expected}", path.display());
                assert_eq!(error, expected);
            }
            (result, _) => panic!("{first:?}, {second:?}: {result:?}"),
        }
        drop(opened);
        // A process that another test has just forked keeps the lock until it executes its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = open(second) {
            assert!(Instant::now() < deadline, "{error}");
            std::thread::yield_now();
        }
    }
}

/// A file that one machine writes as a raw disk cannot be the image of another machine.
#[test]
fn image_that_another_machine_writes_is_refused() {
    let volume = volume(&["debian.raw"]);
    let _raw = open(
        &volume.path().join("debian.raw"),
        DiskContent::Detected,
        &FileUser::default(),
    )
    .unwrap();
    let error = open(volume.path(), DiskContent::Detected, &FileUser::default()).unwrap_err();
    let expected = "disk data: /disks/data/debian.raw is locked: another virtual machine writes it";
    assert_eq!(error, expected);
}

/// The guest of an earlier machine may have written the header of another format.
#[test]
fn only_an_image_that_no_guest_can_write_has_its_format_detected_ghsa_jmr4_g2hv_mjj6() {
    for (file, path, content, expected) in [
        ("disk.img", "", DiskContent::Ephemeral, BaseFormat::Raw),
        // The mount is the file itself.
        ("my.disk", "my.disk", DiskContent::Ephemeral, BaseFormat::Raw),
        ("debian.qcow2", "", DiskContent::Ephemeral, BaseFormat::Detected),
        ("debian.qcow2", "", DiskContent::Detected, BaseFormat::Detected),
    ] {
        let volume = volume(&[file]);
        match open(&volume.path().join(path), content, &FileUser::default()).unwrap() {
            OpenedDisk::Image { image, read_only } => {
                assert_eq!((image.format, read_only), (expected, false), "{file} {content:?}");
            }
            opened @ OpenedDisk::Raw { .. } => panic!("{opened:?}"),
        }
    }
}

#[test]
fn volume_without_one_disk_is_refused_with_the_reason() {
    let empty = volume(&[]);
    let two = volume(&["a", "b"]);
    let link = volume(&[]);
    symlink("/etc/passwd", link.path().join("disk.img")).unwrap();
    let directory = volume(&["disk.img/x"]);
    // Opening it would fail: no driver has this number.
    let device = volume(&[]);
    mknod(
        &device.path().join("disk.img"),
        SFlag::S_IFCHR,
        Mode::S_IRWXU,
        makedev(4095, 1),
    )
    .unwrap();
    for (volume, expected) in [
        (&empty, "disk data: no disk.img is in the volume, and it is empty"),
        (
            &empty,
            "containerd must support them (2.1 or later), and the host's mounts must be shared",
        ),
        (&two, "and contains a, b"),
        (&link, "disk.img is a symbolic link, not a regular file"),
        (&directory, "disk.img is a directory, not a regular file"),
        (&device, "disk.img is a device node, not a regular file"),
    ] {
        let error = open(volume.path(), DiskContent::Detected, &FileUser::default()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let error = open(&PathBuf::from("/no/such/volume"), DiskContent::Detected, &OTHER).unwrap_err();
    assert!(error.contains("/disks/data: cannot open the volume"), "{error}");
}

/// A tenant who can write the volume may put any link there.
#[test]
fn link_in_a_volume_is_never_a_disk_ghsa_qw6q_3pgr_5cwq() {
    let outside = volume(&["secret"]);
    let secret = outside.path().join("secret");
    let climbing = Path::new("../../../../../../../..").join(secret.strip_prefix("/").unwrap());
    for target in [&secret, &climbing, Path::new("/proc/self/exe"), Path::new("other")] {
        for (link, contents) in [
            (
                "disk.img",
                &[
                    DiskContent::Detected,
                    DiskContent::Ephemeral,
                    DiskContent::Blank { size: 1 << 20 },
                ][..],
            ),
            ("disk/image.raw", &[DiskContent::Detected, DiskContent::Ephemeral]),
            ("image.raw", &[DiskContent::Detected, DiskContent::Ephemeral]),
        ] {
            let volume = volume(&[]);
            let path = volume.path().join(link);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, &path).unwrap();
            for content in contents {
                let error = open(volume.path(), *content, &FileUser::default()).unwrap_err();
                assert!(
                    error.contains("symbolic link"),
                    "{link} to {}: {error}",
                    target.display()
                );
            }
        }
    }
    // The directory itself is a link.
    let linked = volume(&[]);
    symlink(outside.path(), linked.path().join("disk")).unwrap();
    let error = open(linked.path(), DiskContent::Detected, &FileUser::default()).unwrap_err();
    assert!(error.contains("symbolic link"), "{error}");
    assert_eq!(fs::read(&secret).unwrap(), [0; 512]);
}

#[test]
fn number_that_is_no_block_device_is_refused() {
    let snapshot = tempfile::tempdir().unwrap();
    let device = VmDisk {
        source: DiskSource::BlockDevice { major: 4095, minor: 1 },
        ..disk(Path::new("/"), DiskContent::Detected)
    };
    let error = volumes::open(&device, &image_root(&snapshot), &OTHER)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("block device 4095:1: cannot read /sys/dev/block/4095:1/uevent"),
        "{error}"
    );
}
