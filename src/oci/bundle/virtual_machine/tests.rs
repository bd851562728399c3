//! Plans of virtual machines.

use std::io;

use serde_json::{Value, json};

use super::*;
use crate::oci::{
    BundleSpec, DEFAULT_MEMORY, DEFAULT_VCPUS, DataSource, DiskContent, DiskSource, HostFiles, Network, OnReboot,
    ReadOnly, SourceKind, VmKernel,
};

const SIZING: Sizing = Sizing {
    default_memory: DEFAULT_MEMORY,
    default_vcpus: DEFAULT_VCPUS,
    max_memory: 8 << 30,
    max_vcpus: 8,
};

fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": arguments, "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/resolv.conf", "type": "bind", "source": "/h/resolv.conf", "options": ["rbind"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/h/hosts", "options": ["rbind", "rw"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}],
            "resources": {"memory": {"limit": 1u64 << 30}, "cpu": {"quota": 150_000, "period": 100_000}},
        },
        "annotations": {},
    })
}

fn read(spec: &Value) -> BundleSpec {
    let bundle = tempfile::tempdir().unwrap();
    std::fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
    BundleSpec::read(bundle.path()).unwrap()
}

fn overlay() -> HostMount {
    HostMount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec!["lowerdir=/s/1/fs".to_owned()],
    }
}

fn directory(_: &Path) -> io::Result<SourceKind> {
    Ok(SourceKind::Directory)
}

fn planned(spec: &Value) -> Result<VmPlan, String> {
    planned_with(VmPolicy::default(), spec)
}

fn planned_with(policy: VmPolicy, spec: &Value) -> Result<VmPlan, String> {
    let planned = read(spec).plan_virtual_machine(policy, &SIZING, &directory);
    planned.map_err(|error| error.to_string())
}

fn with_annotations(annotations: Value) -> Value {
    let mut spec = spec(&["vm"]);
    spec["annotations"] = annotations;
    spec
}

#[test]
fn command_names_a_virtual_machine() {
    for (arguments, expected) in [
        (&["vm"][..], true),
        (&["no-entrypoint"], true),
        (&["no-entrypoint", "sh"], true),
        (&["vm", "-x"], false),
        (&["/bin/vm"], false),
        (&["sh"], false),
    ] {
        let image = read(&spec(arguments)).virtual_machine_image(&[overlay()]).unwrap();
        assert_eq!(image.is_some(), expected, "{arguments:?}");
        assert!(image.is_none_or(|image| image.0 == HostFiles::Mounts(vec![overlay()])));
    }
}

#[test]
fn settings_come_from_limits_and_annotations() {
    let uid = "6f1c6f2b-6d5c-4a2b-9d0e-0123456789ab";
    let mut spec = with_annotations(json!({
        "io.containerd.nutshell.vm.on-reboot": "exit",
        "io.containerd.nutshell.vm.kernel-arguments": " systemd.unit=rescue.target ",
        "io.containerd.nutshell.vcpus": "3",
        "io.kubernetes.cri.sandbox-uid": uid,
    }));
    spec["process"]["oomScoreAdj"] = json!(7);
    spec["process"]["env"] = json!(["A=b", "HOSTNAME=web-0"]);

    let plan = planned(&spec).unwrap();

    assert_eq!((plan.size.boot.memory, plan.size.boot.vcpus), (1 << 30, 3));
    assert_eq!((plan.on_reboot, plan.oom_score_adj), (OnReboot::Exit, 7));
    assert_eq!(plan.kernel_arguments, "systemd.unit=rescue.target");
    assert_eq!((plan.kernel, plan.network), (VmKernel::Disk, Network::Loopback));
    assert_eq!(plan.hostname.as_deref(), Some("web-0"));
    assert_eq!(plan.resolv_conf.as_deref(), Some(Path::new("/h/resolv.conf")));
    assert_eq!(plan.identity, VmIdentity::Pod(uid.to_owned()));

    spec["annotations"] = json!({});
    let identity = planned(&spec).unwrap().identity;
    assert!(
        matches!(&identity, VmIdentity::Bundle(bundle) if bundle.is_absolute()),
        "{identity:?}"
    );
}

#[test]
fn annotation_decides_which_agents_the_guest_may_have() {
    let agents = |annotations| {
        let exec = planned(&with_annotations(annotations)).unwrap().exec;
        (exec.has_agent(), exec.has_guest_agent_port())
    };
    assert_eq!(agents(json!({})), (true, true));
    for (value, expected) in [
        ("auto", (true, true)),
        ("agent", (true, false)),
        ("qga", (false, true)),
        ("none", (false, false)),
    ] {
        assert_eq!(
            agents(json!({"io.containerd.nutshell.vm.exec": value})),
            expected,
            "{value}"
        );
    }
}

#[test]
fn kernel_comes_from_the_mount_for_it() {
    let mut spec = with_annotations(json!({
        "io.containerd.nutshell.vm.kernel": "/boot/vmlinuz",
        "io.containerd.nutshell.vm.initrd": "initrd.img",
    }));
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/kernel", "type": "bind", "source": "/v/kernel", "options": ["rbind"]}));
    let expected = VmKernel::Files {
        directory: "/v/kernel".into(),
        kernel: "boot/vmlinuz".into(),
        initramfs: Some("initrd.img".into()),
    };
    assert_eq!(planned(&spec).unwrap().kernel, expected);

    spec["annotations"] = json!({});
    let error = planned(&spec).unwrap_err();
    assert!(
        error.starts_with("annotation io.containerd.nutshell.vm.kernel: it is missing"),
        "{error}"
    );
}

/// The only paths are those of a kernel and an initrd, which lead into the mount at `/kernel`.
#[test]
fn annotation_names_no_file_of_the_host_cve_2020_27151() {
    let keys = [
        "datasource",
        "disk.data",
        "exec",
        "initrd",
        "kernel",
        "max-memory",
        "max-vcpus",
        "on-reboot",
    ];
    for key in keys {
        for value in [
            "../../bin/sh",
            "/boot/../../bin/sh",
            "./../sh",
            "unix:///run/containerd/containerd.sock/..",
        ] {
            let mut spec = with_annotations(json!({format!("io.containerd.nutshell.vm.{key}"): value}));
            let mounts = spec["mounts"].as_array_mut().unwrap();
            for destination in ["/kernel", "/disks/data", "/cloud-init"] {
                mounts.push(bind(destination, "/v/x", &["rbind"]));
            }
            let error = planned(&spec).unwrap_err();
            assert!(error.contains(&format!("nutshell.vm.{key}")), "{key} {value}: {error}");
        }
    }
}

#[test]
fn wrong_annotation_is_refused_with_its_name_and_value() {
    for (key, value, expected) in [
        ("on-rebot", "exit", "unknown: a virtual machine has the annotations"),
        ("on-reboot", "never", "\"never\" is neither"),
        (
            "exec",
            "ssh",
            "\"ssh\" is not one of \"auto\", \"agent\", \"qga\" and \"none\"",
        ),
        ("kernel-arguments", "a\nb", "'\\n' is not a printable ASCII character"),
        (
            "kernel-arguments",
            &"a".repeat(1025),
            "1025 bytes are more than the maximum of 1024",
        ),
        ("kernel", "../vmlinuz", "\"../vmlinuz\" is not the path of a file"),
        ("kernel", "/", "\"/\" is not the path of a file"),
        ("kernel", "vmlinuz", "there is no mount at /kernel"),
        ("initrd", "initrd", "it is missing"),
        ("datasource", "floppy", "\"floppy\" is none of nocloud"),
        ("datasource", "nocloud", "there is no mount at /cloud-init"),
        ("disk.data", "rw", "\"rw\" is none of boot"),
        ("disk.data", "ro", "there is no mount at /disks/data"),
    ] {
        let error = planned(&with_annotations(
            json!({format!("io.containerd.nutshell.vm.{key}"): value}),
        ))
        .unwrap_err();
        assert!(
            error.starts_with("annotation io.containerd.nutshell.vm.k") || error.contains(key),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
    }
}

/// The host would have to mount it, to open the files in it.
#[test]
fn root_on_a_disk_that_a_guest_may_have_written_is_refused() {
    let mount = |kind: &str, source: &str, options: &[&str]| HostMount {
        kind: kind.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    };
    let overlay = [
        "upperdir={{ mount 0 }}/upper",
        "workdir={{ mount 0 }}/work",
        "lowerdir={{ mount 1 }}",
    ];
    for (mounts, named) in [
        (
            vec![mount("ext4", "/dev/mapper/pool-snap-7", &[])],
            "/dev/mapper/pool-snap-7",
        ),
        (
            vec![
                mount("ext4", "/s/9/rwlayer.img", &["rw", "loop"]),
                mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]),
                mount("format/overlay", "overlay", &overlay),
            ],
            "/s/9/rwlayer.img",
        ),
    ] {
        let error = read(&spec(&["vm"])).virtual_machine_image(&mounts).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(named) && error.contains("snapshotter"), "{error}");
    }
}

fn bind(destination: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

#[test]
fn mounts_become_disks_seed_and_shared_directories() {
    let mut spec = with_annotations(json!({
        "io.containerd.nutshell.vm.disk.root": "boot",
        "io.containerd.nutshell.vm.disk.scratch": "blank,size=2Gi",
        "io.containerd.nutshell.vm.datasource": "configdrive",
        "io.kubernetes.cri.sandbox-uid": "u",
        "io.kubernetes.cri.sandbox-namespace": "ns",
        "io.kubernetes.cri.sandbox-name": "db-0",
        "io.kubernetes.cri.container-name": "vm",
    }));
    spec["process"]["user"] = json!({"uid": 107, "gid": 107, "additionalGids": [5]});
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(bind("/disks/root", "/v/root", &["rbind", "rw"]));
    mounts.push(bind("/disks/tools", "/v/tools", &["rbind", "ro"]));
    mounts.push(bind("/disks/scratch", "/v/scratch", &["rbind"]));
    mounts.push(bind("/cloud-init", "/v/seed", &["rbind", "ro"]));
    mounts.push(bind("/srv/src", "/v/src", &["rbind", "ro"]));

    let plan = planned(&spec).unwrap();

    let disks: Vec<_> = plan
        .disks
        .iter()
        .map(|disk| {
            (
                disk.name.as_str(),
                disk.source.clone(),
                disk.read_only,
                disk.is_boot_disk,
            )
        })
        .collect();
    let volume = |path: &str, content, is_read_only| DiskSource::Volume {
        path: path.into(),
        content,
        is_read_only,
    };
    assert_eq!(
        disks,
        [
            ("root", volume("/v/root", DiskContent::Detected, false), false, true),
            ("tools", volume("/v/tools", DiskContent::Detected, true), false, false),
            (
                "scratch",
                volume("/v/scratch", DiskContent::Blank { size: 2 << 30 }, false),
                false,
                false
            ),
        ]
    );
    let seed = plan.seed.unwrap();
    assert_eq!(
        (seed.directory.as_path(), seed.source),
        (Path::new("/v/seed"), DataSource::ConfigDrive)
    );
    let [share] = &plan.shares[..] else {
        panic!("{:?}", plan.shares)
    };
    assert_eq!((share.path.as_str(), share.read_only), ("srv/src", ReadOnly::All));
    assert_eq!((plan.user.uid, plan.user.additional_gids), (107, vec![5]));
    let expected = VmIdentity::Names {
        namespace: "ns".to_owned(),
        pod: "db-0".to_owned(),
        container: "vm".to_owned(),
    };
    assert_eq!(plan.identity, expected);
}

#[test]
fn block_device_is_a_disk_if_its_rule_allows_it() {
    let mut spec = spec(&["vm"]);
    spec["linux"]["devices"] = json!([{"path": "/dev/db", "type": "b", "major": 253, "minor": 7}]);
    for (access, expected) in [
        (Some("rwm"), Some(false)),
        (Some("rm"), Some(true)),
        (Some("m"), None),
        (None, None),
    ] {
        let mut rules = vec![json!({"allow": false, "access": "rwm"})];
        rules.extend(
            access.map(|access| json!({"allow": true, "type": "b", "major": 253, "minor": 7, "access": access})),
        );
        spec["linux"]["resources"]["devices"] = json!(rules);
        match (planned(&spec), expected) {
            (Ok(plan), Some(read_only)) => {
                let [disk] = &plan.disks[..] else {
                    panic!("{:?}", plan.disks)
                };
                let source = DiskSource::BlockDevice { major: 253, minor: 7 };
                assert_eq!((disk.name.as_str(), disk.read_only), ("db", read_only));
                assert_eq!(disk.source, source);
            }
            (Err(error), None) => assert!(error.contains("/dev/db: linux.resources.devices"), "{error}"),
            (result, _) => panic!("{access:?}: {result:?}"),
        }
    }
}

#[test]
fn block_device_can_be_the_boot_disk_or_read_only_but_not_ephemeral_or_blank() {
    let mut spec = spec(&["vm"]);
    spec["linux"]["devices"] = json!([{"path": "/dev/db", "type": "b", "major": 253, "minor": 7}]);
    spec["linux"]["resources"]["devices"] =
        json!([{"allow": true, "type": "b", "major": 253, "minor": 7, "access": "rwm"}]);
    for (annotation, expected) in [
        ("boot", Some((true, false))),
        ("ro", Some((false, true))),
        ("boot,ro", Some((true, true))),
        ("ephemeral", None),
        ("blank,size=10Mi", None),
    ] {
        spec["annotations"] = json!({"io.containerd.nutshell.vm.disk.db": annotation});
        match (planned(&spec), expected) {
            (Ok(plan), Some(expected)) => {
                assert_eq!(
                    (plan.disks[0].is_boot_disk, plan.disks[0].read_only),
                    expected,
                    "{annotation}"
                );
            }
            (Err(error), None) => assert!(error.contains("/dev/db: a block device"), "{annotation}: {error}"),
            (result, _) => panic!("{annotation}: {result:?}"),
        }
    }
}

#[test]
fn configuration_of_the_host_can_refuse_virtual_machines_and_limit_their_disks() {
    let mut spec = spec(&["vm"]);
    spec["mounts"] = json!([bind("/disks/a", "/v", &[]), bind("/disks/b", "/v", &[])]);
    let policy = |enabled, max_disks| VmPolicy { enabled, max_disks };
    planned_with(policy(true, 2), &spec).unwrap();
    for (policy, expected) in [
        (
            policy(false, 2),
            "process.args: the command requests a virtual machine, and this host runs none: set `enabled",
        ),
        (
            policy(true, 1),
            "/disks: 2 disks are more than the maximum of 1 (`max_disks` in section [vm]",
        ),
        (policy(true, 0), "/disks: 2 disks are more than the maximum of 0"),
    ] {
        let error = planned_with(policy, &spec).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn wrong_mount_is_refused_with_its_path() {
    let mount = |destination: &str, options: &[&str]| {
        let mut spec = spec(&["vm"]);
        spec["mounts"] = json!([bind(destination, "/v", options)]);
        spec
    };
    let two_boot_disks = {
        let mut spec = with_annotations(json!({
            "io.containerd.nutshell.vm.disk.a": "boot",
            "io.containerd.nutshell.vm.disk.b": "boot",
        }));
        spec["mounts"] = json!([bind("/disks/a", "/v", &[]), bind("/disks/b", "/v", &[])]);
        spec
    };
    let many = {
        let mut spec = spec(&["vm"]);
        let mounts = (0..11).map(|disk| bind(&format!("/disks/d{disk}"), "/v", &[]));
        spec["mounts"] = json!(mounts.collect::<Vec<_>>());
        spec
    };
    for (spec, expected) in [
        (
            mount("/disks/a-name-that-is-too-long", &[]),
            "mount /disks/a-name-that-is-too-long: the name",
        ),
        (mount("/disks/a/b", &[]), "mount /disks/a/b: the name"),
        (
            mount("/data", &["rbind", "idmap"]),
            "mount /data: a directory that is shared",
        ),
        (two_boot_disks, "both a and b are boot disks"),
        (many, "11 disks are more than the maximum of 10"),
    ] {
        let error = planned(&spec).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn privileged_container_gets_no_disk_of_the_host() {
    let mut spec = spec(&["vm"]);
    spec["linux"]["devices"] = json!([
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        {"path": "/dev/watchdog", "type": "c", "major": 10, "minor": 130},
        {"path": "/dev/db", "type": "b", "major": 253, "minor": 7},
    ]);
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": true, "access": "rwm"},
        {"allow": true, "type": "b", "major": 253, "minor": 7, "access": "rwm"},
    ]);
    let plan = planned(&spec).unwrap();
    let names: Vec<_> = plan.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["db"]);
}
