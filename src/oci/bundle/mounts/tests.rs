use std::io;

use serde_json::{Value, json};

use super::*;

fn inspect(path: &Path) -> io::Result<SourceKind> {
    Ok(match path.to_str().unwrap() {
        "/missing" => return Err(io::ErrorKind::NotFound.into()),
        "/dev/null" => SourceKind::Character { major: 1, minor: 3 },
        "/host/tun" => SourceKind::Character { major: 10, minor: 200 },
        "/dev/nvidia0" => SourceKind::Character { major: 195, minor: 0 },
        "/dev/sda" => SourceKind::Block,
        "/run/docker.sock" => SourceKind::Socket,
        "/run/pipe" => SourceKind::Fifo,
        "/dev/hugepages" => SourceKind::HugePages,
        "/link-to-proc" => SourceKind::Kernel,
        "/run/containerd/sandboxes/p/shm" => SourceKind::SharedMemory { size: 1 << 20 },
        "/bundle/hosts" => SourceKind::File,
        _ => SourceKind::Directory,
    })
}

fn translate(in_pod: bool, mounts: Value) -> Result<Mounts, PlanError> {
    let translator = MountTranslator {
        bundle: Path::new("/bundle"),
        id: &"c1".parse().unwrap(),
        in_pod,
        host: HostNamespaces::Refuse,
        id_map: None,
        inspect: &inspect,
    };
    translator.translate(serde_json::from_value(mounts).unwrap())
}

fn guest(mounts: &Mounts) -> Value {
    serde_json::to_value(&mounts.guest).unwrap()
}

#[test]
fn directories_of_the_host_become_shares_numbered_in_order() {
    let translated = translate(
        false,
        json!([
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rw"]},
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "source": "hosts", "options": ["bind", "ro", "rslave"]},
            {"destination": "/x", "type": "bind", "source": "/dev/shm/x/../y", "options": ["rro"]},
        ]),
    )
    .unwrap();
    let share = |source: &str, path: &str, read_only, recursive| Share {
        source: source.into(),
        path: path.to_owned(),
        read_only,
        recursive,
        id_map: None,
    };
    let shares = [
        share("/srv/data", "c1/0", ReadOnly::None, true),
        share("/bundle/hosts", "c1/1", ReadOnly::Top, false),
        share("/dev/shm/y", "c1/2", ReadOnly::All, false),
    ];
    assert_eq!(translated.shares, shares);
    let expected = json!([
        {"destination": "/data", "type": "bind", "source": "/run/nutshell/share/c1/0", "options": ["rbind", "rw"]},
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/run/nutshell/share/c1/1",
         "options": ["bind", "ro", "rslave"]},
        {"destination": "/x", "type": "bind", "source": "/run/nutshell/share/c1/2", "options": ["rro", "bind"]},
    ]);
    assert_eq!(guest(&translated), expected);
}

/// All directories have mounts below them.
struct MountsBelow;

impl Inspect for MountsBelow {
    fn kind(&self, path: &Path) -> io::Result<SourceKind> {
        inspect(path)
    }

    fn has_mounts_below(&self, _: &Path) -> io::Result<bool> {
        Ok(true)
    }

    fn restrictions(&self, _: &Path) -> io::Result<MountRestrictions> {
        Ok(MountRestrictions::default())
    }
}

/// All mounts of the host are `nosuid` and `noexec`.
struct RestrictedMounts;

impl Inspect for RestrictedMounts {
    fn kind(&self, path: &Path) -> io::Result<SourceKind> {
        inspect(path)
    }

    fn has_mounts_below(&self, _: &Path) -> io::Result<bool> {
        Ok(false)
    }

    fn restrictions(&self, _: &Path) -> io::Result<MountRestrictions> {
        Ok(MountRestrictions {
            nosuid: true,
            noexec: true,
        })
    }
}

#[test]
fn share_keeps_the_restrictions_of_the_hosts_mount_unless_the_spec_lifts_them() {
    for (options, in_guest) in [
        (json!(["rbind"]), json!(["rbind", "nosuid", "noexec"])),
        (json!(["rbind", "nosuid"]), json!(["rbind", "nosuid", "noexec"])),
        (json!(["rbind", "exec"]), json!(["rbind", "exec", "nosuid"])),
        (json!(["rbind", "suid", "exec"]), json!(["rbind", "suid", "exec"])),
    ] {
        let translator = MountTranslator {
            bundle: Path::new("/bundle"),
            id: &"c1".parse().unwrap(),
            in_pod: false,
            host: HostNamespaces::Refuse,
            id_map: None,
            inspect: &RestrictedMounts,
        };
        let mount = json!([{"destination": "/x", "type": "bind", "source": "/srv/data", "options": options}]);
        let translated = translator.translate(serde_json::from_value(mount).unwrap()).unwrap();
        assert_eq!(guest(&translated)[0]["options"], in_guest, "{options}");
    }
}

#[test]
fn host_alone_makes_a_share_read_only_if_mounts_below_it_stay_writable() {
    for (options, read_only, in_guest) in [
        (json!(["rbind", "ro"]), ReadOnly::Top, json!(["rbind"])),
        (json!(["rbind", "rro"]), ReadOnly::All, json!(["rbind", "rro"])),
        (
            json!(["rbind", "rro", "ro"]),
            ReadOnly::All,
            json!(["rbind", "rro", "ro"]),
        ),
        (json!(["bind", "ro"]), ReadOnly::Top, json!(["bind", "ro"])),
        (
            json!(["rbind", "ro", "rw"]),
            ReadOnly::None,
            json!(["rbind", "ro", "rw"]),
        ),
        (json!(["rbind"]), ReadOnly::None, json!(["rbind"])),
    ] {
        let translator = MountTranslator {
            bundle: Path::new("/bundle"),
            id: &"c1".parse().unwrap(),
            in_pod: false,
            host: HostNamespaces::Refuse,
            id_map: None,
            inspect: &MountsBelow,
        };
        let mount = json!([{"destination": "/x", "type": "bind", "source": "/srv/data", "options": options}]);
        let translated = translator.translate(serde_json::from_value(mount).unwrap()).unwrap();
        assert_eq!(translated.shares[0].read_only, read_only, "{options}");
        assert_eq!(guest(&translated)[0]["options"], in_guest, "{options}");
    }
}

#[test]
fn id_mappings_move_from_the_guests_mounts_to_the_shares() {
    let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    let container_map = IdMap::from_options(&["uidmap=0:7:1".to_owned(), "gidmap=0:7:1".to_owned()]).unwrap();
    let translator = MountTranslator {
        bundle: Path::new("/bundle"),
        id: &"c1".parse().unwrap(),
        in_pod: false,
        host: HostNamespaces::Refuse,
        id_map: container_map.as_ref(),
        inspect: &inspect,
    };
    let mounts = json!([
        {"destination": "/a", "type": "bind", "source": "/a", "uidMappings": mapping, "gidMappings": mapping},
        {"destination": "/b", "type": "bind", "source": "/b", "options": ["rbind", "ridmap"]},
    ]);

    let translated = translator.translate(serde_json::from_value(mounts).unwrap()).unwrap();

    let maps: Vec<_> = translated
        .shares
        .iter()
        .map(|share| share.id_map.as_ref().unwrap())
        .collect();
    assert_eq!(
        (maps[0].map.uids.to_string().as_str(), maps[0].recursive),
        ("0 1000 1\n", false)
    );
    assert_eq!(
        (maps[1].map.uids.to_string().as_str(), maps[1].recursive),
        ("0 7 1\n", true)
    );
    for (mount, options) in [(0, json!(["bind"])), (1, json!(["rbind"]))] {
        let mount = &guest(&translated)[mount];
        assert_eq!((&mount["options"], &mount["uidMappings"]), (&options, &Value::Null));
    }
}

#[test]
fn sources_that_the_guest_has_are_bound_inside_the_guest() {
    for (source, expected) in [
        ("/proc", "/proc"),
        ("/sys/fs/cgroup", "/sys/fs/cgroup"),
        ("/etc/../sys/kernel/debug", "/sys/kernel/debug"),
        ("/dev/null", "/dev/null"),
        ("/host/tun", "/dev/net/tun"),
        ("/dev", "/dev"),
    ] {
        let spec = json!([{"destination": "/x", "type": "bind", "source": source, "options": ["rbind"]}]);
        let translated = translate(false, spec).unwrap();
        assert_eq!(guest(&translated)[0]["source"], expected);
        assert_eq!(translated.shares, [], "{source}");
    }
}

#[test]
fn shared_memory_is_private_to_a_single_container_and_shared_in_a_pod() {
    let spec = json!([{"destination": "/dev/shm/", "type": "bind", "source": "/run/containerd/sandboxes/p/shm",
                       "options": ["rbind", "ro"]}]);
    let single = translate(false, spec.clone()).unwrap();
    assert_eq!(guest(&single)[0]["type"], "tmpfs");
    let options = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=1048576", "ro"]);
    assert_eq!(guest(&single)[0]["options"], options);
    let member = translate(true, spec).unwrap();
    assert_eq!(guest(&member)[0]["type"], "bind");
    assert_eq!(guest(&member)[0]["source"], SHM_PATH);
    assert_eq!((single.shares, member.shares), (vec![], vec![]));
}

#[test]
fn shared_memory_of_the_host_is_refused_in_a_pod_but_other_directories_are_shared() {
    let at_shm = |source| json!([{"destination": "/dev/shm", "type": "bind", "source": source}]);
    let error = translate(true, at_shm("/dev/shm")).unwrap_err();
    assert!(error.to_string().contains("hostIPC"), "{error}");
    let single = translate(false, at_shm("/dev/shm")).unwrap();
    assert_eq!(guest(&single)[0]["type"], "tmpfs");
    for in_pod in [true, false] {
        let volume = translate(in_pod, at_shm("/var/lib/kubelet/volume")).unwrap();
        assert_eq!(volume.shares[0].source, Path::new("/var/lib/kubelet/volume"));
        assert_eq!(guest(&volume)[0]["source"], "/run/nutshell/share/c1/0");
    }
}

#[test]
fn default_shm_mount_of_a_member_is_replaced_by_the_pods_and_others_are_kept() {
    let tmpfs = |source, size| json!([{"destination": "/dev/shm", "type": "tmpfs", "source": source, "options": ["nosuid", size]}]);
    let default = translate(true, tmpfs("shm", "size=65536k")).unwrap();
    let expected = json!({"destination": "/dev/shm", "type": "bind", "source": SHM_PATH, "options": ["bind", "rw"]});
    assert_eq!(guest(&default)[0], expected);
    for (in_pod, source, size) in [
        (true, "shm", "size=1g"),
        (true, "tmpfs", "size=65536k"),
        (false, "shm", "size=65536k"),
    ] {
        let private = translate(in_pod, tmpfs(source, size)).unwrap();
        assert_eq!(guest(&private)[0]["type"], "tmpfs", "{source} {size}");
    }
}

#[test]
fn pods_shared_memory_has_the_size_of_the_hosts_tmpfs() {
    for (source, size) in [
        ("/run/containerd/sandboxes/p/shm", 1 << 20),
        ("/dev/shm", DEFAULT_SHM_SIZE),
    ] {
        let mounts = json!([{"destination": "/dev/shm", "type": "bind", "source": source}]);
        let mounts: Vec<Mount> = serde_json::from_value(mounts).unwrap();
        assert_eq!(pod_shm_size(&mounts, &inspect), size);
    }
    assert_eq!(pod_shm_size(&[], &inspect), DEFAULT_SHM_SIZE);
}

#[test]
fn kernel_file_systems_are_mounted_in_the_guest() {
    let mqueue = json!({"destination": "/dev/mqueue", "type": "bind", "source": "/dev/mqueue", "options": ["bind"]});
    let translated = translate(
        false,
        json!([
            {"destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup", "options": ["ro"]},
            {"destination": "/tmp", "type": "tmpfs", "options": ["size=1m"]},
            mqueue,
        ]),
    )
    .unwrap();
    let kinds: Vec<_> = translated
        .guest
        .iter()
        .map(|mount| mount.typ().clone().unwrap())
        .collect();
    assert_eq!(kinds, ["cgroup", "tmpfs", "mqueue"]);
    assert_eq!(translated.guest[1].source().as_deref(), Some(Path::new("tmpfs")));
}

#[test]
fn mount_that_a_machine_cannot_make_is_an_error_with_destination_and_reason() {
    let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    for (mount, named) in [
        (json!({"type": "bind", "source": "/missing"}), "/missing"),
        (json!({"type": "bind", "source": "/dev/nvidia0"}), "/dev/nvidia0"),
        (json!({"type": "bind", "source": "/dev/sda"}), "/dev/sda"),
        (json!({"type": "bind", "source": "/run/docker.sock"}), "socket"),
        (json!({"type": "bind", "source": "/run/pipe"}), "pipe"),
        (json!({"type": "bind", "source": "/dev/hugepages"}), "huge pages"),
        (json!({"type": "bind", "source": "/link-to-proc"}), "/link-to-proc"),
        (json!({"type": "bind"}), "source"),
        (
            json!({"type": "bind", "source": "/a", "options": ["rbind", "rshared"]}),
            "rshared",
        ),
        (
            json!({"type": "bind", "source": "/a", "options": ["rbind", "ro", "rslave"]}),
            "rslave",
        ),
        (
            json!({"type": "bind", "source": "/a", "options": ["idmap"]}),
            "idmap needs a mapping",
        ),
        (
            json!({"type": "bind", "source": "/a", "uidMappings": mapping}),
            "uids and gids",
        ),
        (
            json!({"type": "tmpfs", "uidMappings": mapping, "gidMappings": mapping}),
            "ids can be mapped only in",
        ),
        (
            json!({"type": "bind", "source": "/proc/fs", "uidMappings": mapping, "gidMappings": mapping}),
            "ids can be mapped only in",
        ),
        (json!({"type": "hugetlbfs", "source": "none"}), "huge pages"),
        (json!({"type": "ext4", "source": "/dev/sdb"}), "ext4"),
        (json!({"source": "/dev/sdb"}), "type"),
    ] {
        let mut mount = mount;
        mount["destination"] = json!("/the/destination");
        let error = translate(false, json!([mount])).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
        assert!(error.contains("/the/destination") || named == "/missing", "{error}");
    }
}
