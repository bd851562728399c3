//! Plans of specs as containerd's clients write them: `ctr run` of 1.7 and 2.1, and the CRI plugin.

use std::{fs, io, path::PathBuf, time::Duration};

use serde_json::{Value, json};

use super::*;
use crate::oci::{
    CgroupPath, DEFAULT_MEMORY, DEFAULT_VCPUS, Hook, HostFiles, Network, PidNamespace, ReadOnly, Share, SourceKind,
};

const CTR: &str = include_str!("testdata/ctr-run.json");
const CTR_PRIVILEGED: &str = include_str!("testdata/ctr-run-privileged.json");
const CRI_SANDBOX: &str = include_str!("testdata/cri-sandbox.json");
const CRI_CONTAINER: &str = include_str!("testdata/cri-container.json");

const MIB: u64 = 1 << 20;

const SIZING: Sizing = Sizing {
    default_memory: DEFAULT_MEMORY,
    default_vcpus: DEFAULT_VCPUS,
    max_memory: 4096 * MIB,
    max_vcpus: 8,
};

fn spec(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn plan_of(spec: &Value) -> Result<Plan, PlanError> {
    match planned(spec)? {
        BundlePlan::Container(plan) => Ok(*plan),
        BundlePlan::Sandbox(pod) => panic!("{pod:?}"),
    }
}

fn pod_of(spec: &Value) -> Result<PodPlan, PlanError> {
    match planned(spec)? {
        BundlePlan::Sandbox(pod) => Ok(*pod),
        BundlePlan::Container(plan) => panic!("{plan:?}"),
    }
}

fn planned(spec: &Value) -> Result<BundlePlan, PlanError> {
    let bundle = tempfile::tempdir().unwrap();
    fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
    let overlay = HostMount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec!["lowerdir=/s/1/fs".to_owned()],
    };
    let inspect = |path: &Path| -> io::Result<SourceKind> {
        Ok(match path.ends_with("5d4e/shm") {
            true => SourceKind::SharedMemory { size: 128 * MIB },
            false => SourceKind::Directory,
        })
    };
    let id = "c7".parse().unwrap();
    BundleSpec::read(bundle.path())?.plan(&id, &[overlay], &SIZING, HostNamespaces::Refuse, &inspect)
}

fn guest(plan: &Plan) -> Value {
    serde_json::from_slice(&plan.spec.clone().encode(&[]).unwrap()).unwrap()
}

/// The process with its sets of capabilities sorted, for comparison.
fn process(spec: &Value) -> Value {
    let mut process = spec["process"].clone();
    for set in process["capabilities"].as_object_mut().unwrap().values_mut() {
        let mut names: Vec<_> = set.as_array().unwrap().iter().map(Value::to_string).collect();
        names.sort();
        *set = json!(names);
    }
    process
}

/// A spec with one value set at a JSON pointer.
fn with(text: &str, pointer: &str, value: Value) -> Value {
    let mut spec = spec(text);
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[name] = value;
    spec
}

#[test]
fn plain_ctr_run_gets_its_own_machine_of_default_size_with_loopback() {
    let plan = plan_of(&spec(CTR)).unwrap();
    assert_eq!(plan.placement, Placement::Single);
    assert_eq!(plan.network, Network::Loopback);
    assert_eq!((plan.size.memory, plan.size.vcpus), (DEFAULT_MEMORY, DEFAULT_VCPUS));
    assert_eq!(plan.cgroup, Some(CgroupPath::Absolute("default/c1".into())));
    assert_eq!(plan.pid_namespace, PidNamespace::Specified);
    assert!(!plan.terminal);
    assert_eq!((&plan.shares[..], &plan.warnings[..]), (&[][..], &[][..]));
    assert!(matches!(
        &plan.root,
        Root::Share { files: HostFiles::Mounts(mounts), .. } if mounts[0].kind == "overlay"
    ));
}

/// Names of files, programs and arguments that annotations give to other runtimes.
const OTHER_RUNTIMES: [(&str, &str); 12] = [
    ("io.katacontainers.config.hypervisor.path", "/bin/sh"),
    ("io.katacontainers.config.hypervisor.jailer_path", "/bin/sh"),
    ("io.katacontainers.config.hypervisor.kernel", "/etc/shadow"),
    ("io.katacontainers.config.hypervisor.initrd", "/etc/shadow"),
    ("io.katacontainers.config.hypervisor.image", "/etc/shadow"),
    (
        "io.katacontainers.config.hypervisor.kernel_params",
        "agent.debug_console",
    ),
    ("io.katacontainers.config.hypervisor.virtio_fs_daemon", "/bin/sh"),
    (
        "io.katacontainers.config.hypervisor.virtio_fs_extra_args",
        "[\"-o\",\"source=/\"]",
    ),
    ("io.katacontainers.config.hypervisor.file_mem_backend", "/etc"),
    ("io.katacontainers.config_path", "/etc/shadow"),
    ("kubevirt.io/kernel", "../../../etc/shadow"),
    ("run.oci.handler", "krun"),
];

fn with_annotations(text: &str, annotations: impl IntoIterator<Item = (String, Value)>) -> Value {
    let mut spec = spec(text);
    let existing = spec["annotations"].as_object().cloned().unwrap_or_default();
    spec["annotations"] = existing
        .into_iter()
        .chain(annotations)
        .collect::<serde_json::Map<_, _>>()
        .into();
    spec
}

#[test]
fn annotations_of_other_runtimes_change_no_plan_ghsa_rr59_xxvx_96qr() {
    let without_annotations = |mut plan: Plan| {
        let mut guest = guest(&plan);
        guest.as_object_mut().unwrap().remove("annotations");
        if guest["process"]["capabilities"].is_object() {
            guest["process"] = process(&guest);
        }
        plan.spec = GuestSpec::new(Spec::default());
        (plan, guest)
    };
    let foreign = || OTHER_RUNTIMES.map(|(name, value)| (name.to_owned(), json!(value)));
    for text in [CTR, CTR_PRIVILEGED, CRI_CONTAINER] {
        let plan = plan_of(&with_annotations(text, foreign())).unwrap();
        let expected = plan_of(&spec(text)).unwrap();
        assert_eq!(without_annotations(plan), without_annotations(expected));
    }
    assert_eq!(
        pod_of(&with_annotations(CRI_SANDBOX, foreign())).unwrap(),
        pod_of(&spec(CRI_SANDBOX)).unwrap()
    );
}

/// The annotations of a container are numbers. Those of a virtual machine are in `virtual_machine::tests`.
#[test]
fn annotation_names_no_file_of_the_host_cve_2020_27151() {
    for name in ["memory_mib", "vcpus"] {
        let name = format!("io.containerd.nutshell.{name}");
        for value in ["/bin/sh", "../sh", "unix:///run/containerd/containerd.sock", ""] {
            let annotation = [(name.clone(), json!(value))];
            let error = plan_of(&with_annotations(CTR, annotation)).unwrap_err().to_string();
            assert!(error.contains(&name), "{error}");
        }
    }
}

#[test]
fn process_settings_reach_the_guest_unchanged() {
    let original = spec(CTR);
    let guest = guest(&plan_of(&original).unwrap());
    assert_eq!(process(&guest), process(&original));
    assert_eq!(guest["mounts"], original["mounts"]);
    for field in ["maskedPaths", "readonlyPaths"] {
        assert_eq!(guest["linux"][field], original["linux"][field]);
    }
    assert_eq!(guest["linux"]["resources"], original["linux"]["resources"]);
}

#[test]
fn guest_spec_has_paths_of_the_guest() {
    let guest = guest(&plan_of(&spec(CTR)).unwrap());
    assert_eq!(guest["root"]["path"], "/run/nutshell/containers/c7/rootfs");
    assert_eq!(guest["linux"]["cgroupsPath"], "/c7");
    let kinds: Vec<_> = guest["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|namespace| &namespace["type"])
        .collect();
    assert_eq!(kinds, ["pid", "ipc", "uts", "mount", "cgroup"]);
}

#[test]
fn options_of_ctr_run_are_translated() {
    let mut privileged = spec(CTR_PRIVILEGED);
    privileged["process"]["consoleSize"] = json!({"height": 50, "width": 132});
    let plan = plan_of(&privileged).unwrap();
    assert_eq!(plan.network, Network::Host);
    assert_eq!((plan.size.memory, plan.size.vcpus), ((256 + 4 + 64) * MIB, 2));
    assert!(plan.terminal);
    assert_eq!(plan.console_size, Some((132, 50)));
    let sources: Vec<_> = plan.shares.iter().map(|share| share.source.clone()).collect();
    assert_eq!(sources, ["/srv", "/etc/hosts", "/etc/resolv.conf"].map(PathBuf::from));
    let guest = guest(&plan);
    assert_eq!(guest["root"]["readonly"], true);
    assert_eq!(guest["linux"]["seccomp"], privileged["linux"]["seccomp"]);
    assert_eq!(guest["linux"]["resources"]["memory"]["limit"], 268_435_456);
    assert_eq!(process(&guest), process(&privileged));
}

#[test]
fn host_devices_are_removed_from_privileged_containers_and_refused_in_others() {
    let mut privileged = spec(CTR_PRIVILEGED);
    let plan = plan_of(&privileged).unwrap();
    let guest = guest(&plan);
    let nodes: Vec<_> = guest["linux"]["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| &node["path"])
        .collect();
    assert_eq!(nodes, ["/dev/fuse", "/dev/kmsg", "/dev/net/tun", "/dev/null"]);
    assert!(
        plan.warnings
            .iter()
            .any(|warning| warning.contains("removed 2 of the spec's device nodes")),
        "{:?}",
        plan.warnings
    );
    privileged["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    let error = plan_of(&privileged).unwrap_err();
    assert!(error.to_string().contains("/dev/autofs"), "{error}");
    for text in [error.to_string(), plan.warnings.join("\n")] {
        assert!(text.contains("privileged_without_host_devices = true"), "{text}");
    }
}

#[test]
fn sandbox_plan_contains_the_settings_of_the_pod() {
    let pod = pod_of(&spec(CRI_SANDBOX)).unwrap();
    assert_eq!((pod.size.boot.memory, pod.size.boot.vcpus), ((512 + 8 + 64) * MIB, 3));
    assert_eq!(pod.network, Network::Namespace("/var/run/netns/cni-61bf2a7e".into()));
    assert_eq!(
        pod.cgroup,
        Some(CgroupPath::Absolute(
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1b2c.slice/cri-containerd-5d4e.scope".into()
        ))
    );
    let sysctl = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let shared = PodShared {
        hostname: Some("web-0".to_owned()),
        domainname: None,
        sysctls: vec![
            sysctl("net.ipv4.ip_unprivileged_port_start", "0"),
            sysctl("net.ipv4.ping_group_range", "0 2147483647"),
        ],
        shm_size: 128 * MIB,
        resolv_conf: None,
    };
    assert_eq!(pod.shared, shared);
}

#[test]
fn sandbox_with_a_host_namespace_is_refused_with_the_kubernetes_field_name() {
    for (without, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
        let mut sandbox = spec(CRI_SANDBOX);
        let namespaces = sandbox["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != without);
        let error = pod_of(&sandbox).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn member_with_a_shared_pid_namespace_cannot_have_a_user_namespace() {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut member = with(CRI_CONTAINER, "/linux/uidMappings", mapping.clone());
    member["linux"]["gidMappings"] = mapping;
    let namespaces = member["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user", "path": "/proc/4141/ns/user"}));
    namespaces[0]["path"] = json!("/proc/4141/ns/pid");
    let error = plan_of(&member).unwrap_err().to_string();
    assert!(error.contains("shareProcessNamespace"), "{error}");
}

#[test]
fn mounts_of_shares_that_have_another_place_come_from_there() {
    let plan = plan_of(&spec(CRI_CONTAINER)).unwrap();
    let planned: Vec<_> = plan.shares.iter().map(|share| share.path.clone()).collect();
    let places = [(planned[1].clone(), ".shared/7".to_owned())];
    let sources = |spec: Vec<u8>| -> Vec<String> {
        let spec: Value = serde_json::from_slice(&spec).unwrap();
        let mounts = spec["mounts"].as_array().unwrap().iter();
        mounts
            .filter_map(|mount| mount["source"].as_str()?.strip_prefix("/run/nutshell/share/"))
            .map(str::to_owned)
            .collect()
    };

    assert_eq!(sources(plan.spec.clone().encode(&[]).unwrap()), planned);
    let mut moved = planned;
    moved[1] = ".shared/7".to_owned();
    assert_eq!(sources(plan.spec.encode(&places).unwrap()), moved);
}

#[test]
fn member_uses_the_pods_namespaces_and_shares_its_volumes_in_order() {
    let plan = plan_of(&spec(CRI_CONTAINER)).unwrap();
    let sandbox = "5d4e".to_owned();
    assert_eq!(plan.placement, Placement::Member { sandbox });
    let pod = "/var/lib/kubelet/pods/1b2c";
    let share = |source: &str, index: u32, read_only| Share {
        source: format!("{pod}/{source}").into(),
        path: format!("c7/{index}"),
        read_only,
        recursive: true,
        id_map: None,
    };
    let shares = [
        share("etc-hosts", 0, ReadOnly::None),
        share("containers/nginx/7f", 1, ReadOnly::None),
        share("volumes/kubernetes.io~projected/token", 2, ReadOnly::Top),
    ];
    assert_eq!(plan.shares, shares);
    let guest = guest(&plan);
    assert_eq!(
        guest["linux"]["namespaces"],
        json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}])
    );
    assert_eq!(guest["mounts"][7]["source"], "/dev/shm");
    assert_eq!(guest["process"]["oomScoreAdj"], 969);
    assert_eq!(guest["process"]["user"]["additionalGids"], json!([0, 10]));
}

#[test]
fn inapplicable_settings_are_removed_with_one_warning_each() {
    let plan = plan_of(&spec(CRI_CONTAINER)).unwrap();
    let guest = guest(&plan);
    assert_eq!(guest["process"].get("apparmorProfile"), None);
    assert_eq!(guest["process"].get("selinuxLabel"), None);
    let resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 536_870_912, "swap": 536_870_912},
        "cpu": {"shares": 2560, "quota": 250_000, "period": 100_000},
        "pids": {"limit": 1024},
        "unified": {"memory.oom.group": "1"},
    });
    assert_eq!(guest["linux"]["resources"], resources);
    for named in ["apparmorProfile", "selinuxLabel", "cpu.cpus", "cpu.mems", "io.weight"] {
        assert!(plan.warnings.iter().any(|warning| warning.contains(named)), "{named}");
    }
    assert_eq!(plan.warnings.len(), 5, "{:?}", plan.warnings);
}

#[test]
fn hostname_is_kept_for_a_single_container_and_removed_for_a_member() {
    for (text, expected) in [(CTR, json!("mine")), (CRI_CONTAINER, Value::Null)] {
        let plan = plan_of(&with(text, "/hostname", json!("mine"))).unwrap();
        assert_eq!(guest(&plan)["hostname"], expected);
    }
}

#[test]
fn sysctls_stay_in_the_guest_spec() {
    let sysctls = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "1000"});
    let plan = plan_of(&with(CTR, "/linux/sysctl", sysctls.clone())).unwrap();
    assert_eq!(guest(&plan)["linux"]["sysctl"], sysctls);
}

#[test]
fn hooks_are_divided_between_host_and_guest() {
    let hook =
        |name: &str| json!([{"path": format!("/bin/{name}"), "args": [name, "x"], "env": ["A=b"], "timeout": 5}]);
    let hooks = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
        "createContainer": hook("createContainer"), "startContainer": hook("startContainer"),
        "poststart": hook("poststart"), "poststop": [{"path": "/bin/poststop"}],
    });
    let plan = plan_of(&with(CTR, "/hooks", hooks)).unwrap();
    let parsed = Hook {
        path: "/bin/createRuntime".into(),
        arguments: vec!["createRuntime".to_owned(), "x".to_owned()],
        environment: vec!["A=b".to_owned()],
        timeout: Some(Duration::from_secs(5)),
    };
    assert_eq!(plan.hooks.create_runtime, [parsed]);
    assert_eq!(plan.hooks.prestart[0].path, Path::new("/bin/prestart"));
    assert_eq!(plan.hooks.poststart[0].path, Path::new("/bin/poststart"));
    assert_eq!(plan.hooks.poststop[0].timeout, None);
    let kept = json!({"createContainer": hook("createContainer"), "startContainer": hook("startContainer")});
    assert_eq!(guest(&plan)["hooks"], kept);
}

#[test]
fn user_namespace_reaches_the_guest_with_its_mapping() {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = with(CTR, "/linux/uidMappings", mapping.clone());
    spec["linux"]["gidMappings"] = mapping.clone();
    assert!(plan_of(&spec).unwrap_err().to_string().contains("no user namespace"));
    let user = json!({"type": "user"});
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(user.clone());
    let guest = guest(&plan_of(&spec).unwrap());
    assert_eq!(guest["linux"]["uidMappings"], mapping);
    assert!(guest["linux"]["namespaces"].as_array().unwrap().contains(&user));
    let two = json!([{"containerID": 0, "hostID": 1, "size": 1}, {"containerID": 1, "hostID": 5, "size": 1}]);
    spec["linux"]["gidMappings"] = two;
    assert!(plan_of(&spec).unwrap_err().to_string().contains("one range"));
}

#[test]
fn recursive_propagation_of_the_root_is_normalized() {
    for (requested, expected) in [
        ("rshared", json!("shared")),
        ("slave", json!("slave")),
        ("", Value::Null),
    ] {
        let plan = plan_of(&with(CTR, "/linux/rootfsPropagation", json!(requested))).unwrap();
        assert_eq!(guest(&plan)["linux"]["rootfsPropagation"], expected);
    }
}

#[test]
fn unsupported_or_invalid_field_is_an_error_that_names_it() {
    let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    let cases = [
        ("/process", Value::Null, "process"),
        ("/root", Value::Null, "root"),
        ("/linux", Value::Null, "linux"),
        ("/linux/uidMappings", mapping, "linux.uidMappings"),
        ("/linux/namespaces", json!([{"type": "user"}]), "linux.uidMappings"),
        (
            "/linux",
            json!({
                "namespaces": [{"type": "mount"}, {"type": "user"}],
                "uidMappings": [{"containerID": 1, "hostID": 1000, "size": 1}],
                "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
            }),
            "id 0 of the container",
        ),
        (
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1}}),
            "linux.timeOffsets",
        ),
        ("/linux/rootfsPropagation", json!("upward"), "linux.rootfsPropagation"),
        ("/linux/netDevices", json!({"eth0": {}}), "linux.netDevices"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/x"}),
            "linux.seccomp.listenerPath",
        ),
        (
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2MB", "limit": 4_194_304}]),
            "hugepageLimits: 2MB",
        ),
        ("/hooks", json!({"poststop": [{"path": "bin/x"}]}), "hooks.poststop"),
        (
            "/hooks",
            json!({"prestart": [{"path": "/x", "timeout": 0}]}),
            "hooks.prestart",
        ),
        (
            "/annotations",
            json!({"io.kubernetes.cri.container-type": "pod"}),
            "container-type",
        ),
        (
            "/annotations",
            json!({"io.kubernetes.cri.container-type": "container"}),
            "sandbox-id",
        ),
        (
            "/annotations",
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "../x"}),
            "sandbox-id",
        ),
        (
            "/annotations",
            json!({"io.containerd.nutshell.vcpus": "65"}),
            "io.containerd.nutshell.vcpus",
        ),
    ];
    for (pointer, value, named) in cases {
        let error = plan_of(&with(CTR, pointer, value)).unwrap_err().to_string();
        assert!(error.contains(named), "{pointer}: {error}");
    }
}

#[test]
fn unset_memory_limits_do_not_reach_the_guest_as_zero() {
    let memory = json!({"limit": 1_000_000_000, "swap": 0});
    let plan = plan_of(&with(CTR, "/linux/resources/memory", memory)).unwrap();
    assert_eq!(
        guest(&plan)["linux"]["resources"]["memory"],
        json!({"limit": 1_000_000_000})
    );
}

#[test]
fn root_without_mounts_is_the_directory_in_the_spec() {
    let bundle = tempfile::tempdir().unwrap();
    let tree = |_: &Path| -> io::Result<SourceKind> { Ok(SourceKind::Directory) };
    for (path, expected) in [
        ("rootfs", bundle.path().join("rootfs")),
        ("/srv/root", PathBuf::from("/srv/root")),
    ] {
        let spec = with(CTR, "/root/path", json!(path));
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        let id = "c7".parse().unwrap();
        let planned = BundleSpec::read(bundle.path())
            .and_then(|spec| spec.plan(&id, &[], &SIZING, HostNamespaces::Refuse, &tree))
            .unwrap();
        let BundlePlan::Container(plan) = planned else {
            panic!("{planned:?}");
        };
        let files = HostFiles::Directory(expected);
        assert!(matches!(plan.root, Root::Share { files: found, .. } if found == files));
    }
}
