//! `-info` and `-v`: what this runtime is and can do. Neither needs KVM, a configuration or
//! containerd (containerd-contract §1.6).

use std::io::{self, Write};

use containerd_shim_protos::{
    protobuf::{self, Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use serde_json::{Value, json};

const NAME: &str = "io.containerd.nutshell.v2";
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Prints containerd's `RuntimeInfo`.
pub(super) fn print_info() -> io::Result<()> {
    io::stdout().write_all(&info().write_to_bytes()?)
}

/// Prints the version for people.
pub(super) fn print_version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-nutshell-v2 {}",
        env!("CARGO_PKG_VERSION")
    )
}

fn info() -> RuntimeInfo {
    RuntimeInfo {
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

/// The OCI features of a container in a machine (OCI spec, `features-linux.md`). Neither the user
/// namespace nor id-mapped mounts nor `rro` are named before they work: the kubelet relies on them.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
        ],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime",
            "nodev", "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private",
            "rbind", "relatime", "ro", "rprivate", "rslave", "rw", "slave", "strictatime", "suid", "sync",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
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
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Features, LinuxNamespaceType};

    use super::*;

    #[test]
    fn features_are_the_oci_specs_and_claim_no_user_namespace() {
        let bytes = info().write_to_bytes().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(info.name, NAME);
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        let linux = features.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(namespaces.contains(&LinuxNamespaceType::Pid));
        assert!(!namespaces.contains(&LinuxNamespaceType::User));
        assert_eq!(linux.seccomp().as_ref().unwrap().enabled(), &Some(true));
    }
}
