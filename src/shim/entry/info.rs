//! `-info` and `-v`: name, version and features of this runtime (containerd `core/runtime/v2/README.md`,
//! `api/types/introspection.proto`). Neither needs KVM or containerd, and only `-info` reads the configuration.

use std::io::{self, Write};

use containerd_shim::protos::{
    protobuf::{self, Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use nutshell_protocol::MOUNT_OPTIONS;
use serde_json::{Value, json};

use crate::shim::configuration::Configuration;

const NAME: &str = "io.containerd.nutshell.v2";
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The annotation with the types of mounts that containerd leaves to this runtime (containerd, `docs/mounts.md`).
/// containerd 2.2 and later reads it.
const ALLOWED_MOUNTS: (&str, &str) = (
    "containerd.io/runtime-allow-mounts",
    "erofs,ext2,ext3,ext4,format/*,mkdir/*,mkfs/*",
);

/// Prints containerd's `RuntimeInfo`.
pub(crate) fn print_info() -> io::Result<()> {
    // An invalid configuration is not reported here, but when the first container is created.
    let layers = Configuration::load(None).is_ok_and(|configuration| configuration.mount_layers);
    io::stdout().write_all(&info(layers).write_to_bytes()?)
}

/// Prints the version as text.
pub(crate) fn print_version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-nutshell-v2 {}",
        env!("CARGO_PKG_VERSION")
    )
}

/// `layers`: whether containerd leaves the layers of its EROFS snapshotter to this runtime.
fn info(layers: bool) -> RuntimeInfo {
    let (name, value) = ALLOWED_MOUNTS;
    RuntimeInfo {
        annotations: layers
            .then(|| (name.to_owned(), value.to_owned()))
            .into_iter()
            .collect(),
        name: NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            special_fields: protobuf::SpecialFields::default(),
        }),
        ..RuntimeInfo::default()
    }
}

/// All hooks of the OCI spec. Those of the runtime namespace run on the host, the others in the guest.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];

/// All capabilities of Linux.
const CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// The features of a container in a machine (OCI spec, `features-linux.md`). The kubelet relies on some of them, and
/// the tests below compare the list with the specs that a plan accepts. `idmap` depends on the host's file systems, as
/// with every runtime.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS.to_vec(),
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES.to_vec(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "memoryPolicy": {},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use oci_spec::runtime::Features;

    use super::*;
    use crate::oci::{
        self, BundlePlan, DEFAULT_MEMORY, DEFAULT_VCPUS, HostNamespaces, Plan, PlanError, Sizing, SourceKind,
    };

    /// Plans a container whose spec has `value` at the JSON pointer `pointer`.
    fn plan(pointer: &str, value: Value) -> Result<Plan, PlanError> {
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "capabilities": {}},
            "root": {"path": "rootfs"},
            "mounts": [],
            "hooks": {},
            "linux": {"namespaces": [{"type": "user"}, {"type": "pid"}, {"type": "ipc"}], "uidMappings": mapping, "gidMappings": mapping},
        });
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        let sizing = Sizing {
            default_memory: DEFAULT_MEMORY,
            default_vcpus: DEFAULT_VCPUS,
            max_memory: DEFAULT_MEMORY,
            max_vcpus: DEFAULT_VCPUS,
        };
        // Directories refuse the propagations `slave` and `rslave`, which are accepted for files.
        let file = |_: &Path| -> io::Result<SourceKind> { Ok(SourceKind::File) };
        let id = "c1".parse().unwrap();
        match oci::BundleSpec::read(bundle.path())?.plan(&id, &[], &sizing, HostNamespaces::Refuse, &file)? {
            BundlePlan::Container(plan) => Ok(*plan),
            BundlePlan::Sandbox(pod) => panic!("{pod:?}"),
        }
    }

    fn guest_spec(plan: &Plan) -> Value {
        serde_json::from_slice(&plan.spec.clone().encode(&[]).unwrap()).unwrap()
    }

    #[test]
    fn features_parse_as_oci_features() {
        let bytes = info(false).write_to_bytes().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(info.name, NAME);
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        let linux = features.linux().as_ref().unwrap();
        assert_eq!(linux.namespaces().as_ref().unwrap().len(), NAMESPACES.len());
        assert_eq!(linux.seccomp().as_ref().unwrap().enabled(), &Some(true));
    }

    #[test]
    fn mounts_of_layers_are_listed_unless_the_configuration_leaves_them_to_containerd() {
        assert!(info(false).annotations.is_empty());
        let annotations = info(true).annotations;
        let listed = annotations["containerd.io/runtime-allow-mounts"].split(',');
        let listed: Vec<_> = listed.map(|kind| kind.trim_end_matches("/*")).collect();
        assert_eq!(listed, ["erofs", "ext2", "ext3", "ext4", "format", "mkdir", "mkfs"]);
    }

    #[test]
    fn listed_namespaces_are_in_the_guest_spec_or_the_network_plan() {
        for kind in NAMESPACES {
            let mut namespaces: Vec<_> = ["user", "pid", "ipc"].map(|kind| json!({"type": kind})).into();
            if !["user", "pid", "ipc"].contains(&kind) {
                namespaces.push(json!({"type": kind}));
            }
            let plan = plan("/linux/namespaces", json!(namespaces)).unwrap();
            let kept = guest_spec(&plan)["linux"]["namespaces"].to_string();
            let network = plan.network == oci::Network::Loopback;
            assert!(
                kept.contains(&format!("\"{kind}\"")) || (kind == "network" && network),
                "{kind}: {kept}"
            );
        }
    }

    #[test]
    fn listed_hooks_run_either_on_the_host_or_in_the_guest() {
        for moment in HOOKS {
            let plan = plan(&format!("/hooks/{moment}"), json!([{"path": "/bin/hook"}])).unwrap();
            let oci::Hooks {
                prestart,
                create_runtime,
                poststart,
                poststop,
            } = &plan.hooks;
            let host = [prestart, create_runtime, poststart, poststop]
                .map(Vec::len)
                .iter()
                .sum::<usize>();
            let kept = guest_spec(&plan)["hooks"][moment].as_array().map_or(0, Vec::len);
            assert_eq!(host + kept, 1, "{moment}");
        }
    }

    #[test]
    fn listed_mount_options_are_exactly_the_accepted_ones() {
        let planned = |option: &str| {
            let mount = json!([{"destination": "/a", "type": "bind", "source": "/a", "options": ["rbind", option]}]);
            plan("/mounts", mount)
        };
        for option in MOUNT_OPTIONS {
            assert!(planned(option).is_ok(), "{option}");
        }
        for option in ["shared", "rshared"] {
            assert!(planned(option).is_err() && !MOUNT_OPTIONS.contains(&option), "{option}");
        }
    }

    #[test]
    fn listed_capabilities_reach_the_guest() {
        let plan = plan("/process/capabilities/bounding", json!(CAPABILITIES.to_vec())).unwrap();
        let mut kept: Vec<String> =
            serde_json::from_value(guest_spec(&plan)["process"]["capabilities"]["bounding"].clone()).unwrap();
        kept.sort();
        assert_eq!(kept, CAPABILITIES);
    }

    #[test]
    fn disabled_features_are_refused_or_cause_a_warning_and_idmap_works() {
        let linux = &features()["linux"];
        for (feature, pointer, value) in [
            ("apparmor", "/process/apparmorProfile", json!("p")),
            ("selinux", "/process/selinuxLabel", json!("l")),
            ("intelRdt", "/linux/intelRdt", json!({"closID": "x"})),
            ("netDevices", "/linux/netDevices", json!({"eth0": {}})),
        ] {
            assert_eq!(linux[feature]["enabled"], false, "{feature}");
            let field = pointer.trim_start_matches('/').replace('/', ".");
            let text = match plan(pointer, value) {
                Ok(plan) => plan.warnings.join("\n"),
                Err(error) => error.to_string(),
            };
            assert!(text.contains(&field), "{text}");
        }
        let mapping = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let mount = json!([{"destination": "/a", "type": "bind", "source": "/a", "uidMappings": mapping, "gidMappings": mapping}]);
        let enabled = plan("/mounts", mount).is_ok_and(|plan| plan.shares[0].id_map.is_some());
        assert_eq!(linux["mountExtensions"]["idmap"]["enabled"], enabled);
    }
}
