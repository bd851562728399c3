use super::{super::tests::mount, *};

fn layer(filesystem: &str, source: &str, read_only: bool) -> RootLayer {
    RootLayer {
        source: source.into(),
        devices: Vec::new(),
        filesystem: filesystem.to_owned(),
        options: if read_only { vec!["ro".to_owned()] } else { Vec::new() },
        read_only,
        new_file: None,
    }
}

fn at(layer: u32, path: &str) -> LayerPath {
    LayerPath {
        layer,
        path: path.to_owned(),
    }
}

/// The mounts of an active snapshot with two layers below it, in the block mode of the snapshotter.
fn block_mode() -> Vec<HostMount> {
    vec![
        mount(
            "mkfs/ext4",
            "/s/9/rwlayer.img",
            &[
                "X-containerd.mkfs.fs=ext4",
                "X-containerd.mkfs.size=67108864",
                "rw",
                "loop",
            ],
        ),
        mount("erofs", "/s/2/layer.erofs", &["ro", "loop"]),
        mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0700:5:6",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ overlay 1 2 }}",
                "index=off",
            ],
        ),
    ]
}

#[test]
fn writable_disk_with_an_overlay_of_erofs_layers() {
    let mounts = block_mode();
    assert!(are_layers(&mounts));

    let planned = plan_layers(&mounts).unwrap();

    let writable = RootLayer {
        new_file: Some(NewDiskFile {
            size: 64 << 20,
            uuid: None,
        }),
        ..layer("ext4", "/s/9/rwlayer.img", false)
    };
    let directory = |path, mode, owner| NewDirectory {
        path: at(0, path),
        mode,
        owner,
    };
    let layers = vec![
        writable,
        layer("erofs", "/s/2/layer.erofs", true),
        layer("erofs", "/s/1/layer.erofs", true),
    ];
    let root = LayeredRoot {
        directories: vec![directory("upper", 0o755, (0, 0)), directory("work", 0o700, (5, 6))],
        mount: RootMount::Overlay {
            lower: vec![at(1, ""), at(2, "")],
            upper: Some((at(0, "upper"), at(0, "work"))),
            options: vec!["index=off".to_owned()],
        },
    };
    assert_eq!(planned, Root::Disk(RootDisk::Layers { layers, root }));
}

#[test]
fn merged_metadata_has_its_layers_as_devices() {
    let options = ["ro", "loop", "device=/s/1/layer.erofs", "device=/s/2/layer.erofs"];
    let mounts = [mount("erofs", "/s/2/fsmeta.erofs", &options)];
    assert!(are_layers(&mounts));

    let planned = plan_layers(&mounts).unwrap();

    let merged = RootLayer {
        devices: vec!["/s/1/layer.erofs".into(), "/s/2/layer.erofs".into()],
        ..layer("erofs", "/s/2/fsmeta.erofs", true)
    };
    let root = LayeredRoot {
        directories: Vec::new(),
        mount: RootMount::Directory {
            path: at(0, ""),
            read_only: true,
        },
    };
    let layers = vec![merged];
    assert_eq!(planned, Root::Disk(RootDisk::Layers { layers, root }));
}

#[test]
fn root_is_a_directory_of_a_layer_or_the_last_layer() {
    let ext4 = mount("ext4", "/s/9/rwlayer.img", &["rw", "loop"]);
    let erofs = mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]);
    let created = "X-containerd.mkdir.path={{ mount 0 }}/upper";
    for (mounts, path, read_only) in [
        (
            vec![
                ext4.clone(),
                mount("format/mkdir/bind", "{{ mount 0 }}/upper", &[created, "rbind"]),
            ],
            at(0, "upper"),
            false,
        ),
        (
            vec![ext4.clone(), mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])],
            at(0, ""),
            true,
        ),
        (
            vec![erofs.clone(), mount("format/bind", "{{ mount 0 }}", &["rbind"])],
            at(0, ""),
            true,
        ),
        (vec![erofs.clone(), ext4.clone()], at(1, ""), false),
    ] {
        assert!(are_layers(&mounts), "{mounts:?}");
        let planned = plan_layers(&mounts).unwrap();
        let Root::Disk(RootDisk::Layers { root, .. }) = planned else {
            panic!("{planned:?}");
        };
        assert_eq!(root.mount, RootMount::Directory { path, read_only }, "{mounts:?}");
    }
}

#[test]
fn overlay_without_an_upper_directory_is_read_only_and_one_on_the_host_is_made_there() {
    let mounts = |options: &[&str]| {
        vec![
            mount("erofs", "/s/2/layer.erofs", &["loop"]),
            mount("erofs", "/s/1/layer.erofs", &["loop"]),
            mount("format/overlay", "overlay", options),
        ]
    };
    let lower = "lowerdir={{ mount 0 }}:{{ mount 1 }}";

    let read_only = plan_layers(&mounts(&[lower])).unwrap();
    let on_host = plan_layers(&mounts(&["index=off", "workdir=/s/9/work", "upperdir=/s/9/fs", lower])).unwrap();

    assert!(matches!(&read_only, Root::Disk(disk) if disk.is_read_only()));
    let expected = HostOverlay {
        layers: vec![
            layer("erofs", "/s/2/layer.erofs", true),
            layer("erofs", "/s/1/layer.erofs", true),
        ],
        lower: vec![0, 1],
        upper: "/s/9/fs".to_owned(),
        work: "/s/9/work".to_owned(),
        options: vec!["index=off".to_owned()],
    };
    assert!(matches!(on_host, Root::Share { files: HostFiles::Overlay(overlay), .. } if overlay == expected));
}

#[test]
fn sizes_have_the_units_of_containerd() {
    for (text, expected) in [
        ("1024", Some(1024)),
        ("64m", Some(64 << 20)),
        ("1 GiB", Some(1 << 30)),
        ("2KB", Some(2048)),
        ("3T", Some(3 << 40)),
        ("", None),
        ("m", None),
        ("-1", None),
        ("1x", None),
        ("99999999999999t", None),
    ] {
        assert_eq!(parse_size(text), expected, "{text}");
    }
}

#[test]
fn wrong_mounts_are_refused_with_type_and_option() {
    let replaced = |index: usize, mount: HostMount| {
        let mut mounts = block_mode();
        mounts[index] = mount;
        mounts
    };
    let overlay = |options: &[&str]| replaced(3, mount("format/mkdir/overlay", "overlay", options));
    let new_file = |options: &[&str]| replaced(0, mount("mkfs/ext4", "/s/9/rwlayer.img", options));
    let many: Vec<_> = (0..=MAX_ROOT_FILES)
        .map(|number| mount("erofs", &format!("/s/{number}"), &[]))
        .collect();
    let below = HostMount {
        target: "/etc".to_owned(),
        ..mount("erofs", "/s/1", &[])
    };
    for (mounts, expected) in [
        (overlay(&["index=off"]), "\"format/mkdir/overlay\": lowerdir: missing"),
        (overlay(&["lowerdir={{ mount 3 }}"]), "it names mount 3"),
        (
            overlay(&["lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/upper"]),
            "need each other",
        ),
        (
            overlay(&[
                "lowerdir={{ mount 1 }}",
                "upperdir={{ mount 2 }}/upper",
                "workdir={{ mount 0 }}/w",
            ]),
            "it is in a read-only layer",
        ),
        (
            overlay(&["lowerdir={{ mount 1 }}", "upperdir=/s/9/fs", "workdir={{ mount 0 }}/w"]),
            "\"/s/9/fs\" is a path of the host",
        ),
        (
            overlay(&["lowerdir={{ mount 1 }}", "upperdir=/s/9/fs", "workdir=/s/9/work"]),
            "does not mount the layer /s/9/rwlayer.img, because a guest may have written it",
        ),
        (
            vec![
                mount("erofs", "/s/1", &[]),
                mount(
                    "format/overlay",
                    "overlay",
                    &["lowerdir={{ mount 0 }}/x", "upperdir=/s/9/fs", "workdir=/s/9/work"],
                ),
            ],
            "only whole layers",
        ),
        (
            overlay(&["lowerdir={{ mount 1 }}", "uidmap=0:1000:1"]),
            "cannot map ids",
        ),
        (
            overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:0999"]),
            "\"0999\" is not a number",
        ),
        (
            overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:4755"]),
            "more than the permission bits",
        ),
        (
            overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:0755:1"]),
            "it must be PATH",
        ),
        (
            overlay(&["X-containerd.mkdir.path={{ mount 1 }}/a"]),
            "it is in a read-only layer",
        ),
        (new_file(&[]), "X-containerd.mkfs.size: missing or 0"),
        (new_file(&["X-containerd.mkfs.size=many"]), "not a size in bytes"),
        (
            new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.fs=xfs"]),
            "\"xfs\" cannot be made",
        ),
        (
            new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.uuid=1"]),
            "X-containerd.mkfs.uuid=1",
        ),
        (
            new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.color=1"]),
            "unknown",
        ),
        (
            replaced(1, mount("erofs", "layer.erofs", &[])),
            "\"layer.erofs\" is not an absolute path",
        ),
        (
            replaced(1, mount("erofs", "/s/2", &["device=2"])),
            "\"2\" is not an absolute path",
        ),
        (
            replaced(1, mount("ext4", "/s/2", &["device=/2"])),
            "only EROFS has more devices",
        ),
        (
            replaced(1, mount("format/erofs", "{{ source 0 }}", &[])),
            "\"format/erofs\": not supported",
        ),
        (
            replaced(1, mount("overlay", "overlay", &[])),
            "\"overlay\": not supported",
        ),
        (
            replaced(1, mount("mkfs/xfs", "/s/2", &[])),
            "\"mkfs/xfs\": not supported",
        ),
        (
            replaced(1, mount("other/erofs", "/s/2", &[])),
            "\"other/erofs\": not supported",
        ),
        (replaced(1, below), "a layer cannot be mounted below the root"),
        (vec![mount("format/bind", "{{ mount 0 }}", &[])], "it names mount 0"),
        (many, "241 files"),
    ] {
        let error = plan_layers(&mounts).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
