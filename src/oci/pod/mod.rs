//! Plans the pod of a sandbox that has no bundle, from CRI's `PodSandboxConfig`. With `sandboxer = "shim"` containerd
//! passes that message as the options of CreateSandbox (containerd `plugins/sandbox/controller.go`).
//!
//! Belongs here: the message ([`cri`]) and its conversion into a [`PodPlan`]. Does not belong here: sandboxes that have
//! a bundle (`bundle`). Called by the shim through [`plan_pod`].

mod cri;

use std::{collections::HashMap, ffi::OsStr, path::Path};

use prost::Message;

use self::cri::{DnsConfig, LinuxContainerResources, NamespaceMode, NamespaceOption, PodSandboxConfig};
use super::{
    CgroupPath, ContainerId, Hooks, HostNamespaces, Limits, Network, PlanError, PodPlan, PodShared, ResolvConf, Sizing,
    plan::DEFAULT_SHM_SIZE,
};

/// The end of the type URL of the options.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// Prefix of the annotations that are taken from a `PodSandboxConfig`. The author of a pod can write any annotation,
/// including those that only containerd may set.
const OWN_ANNOTATIONS: &str = "io.containerd.nutshell.";

/// Plans the pod of the sandbox `id`.
///
/// `options` is a type URL and an encoded message, `annotations` are those that containerd passes to the runtime.
/// `network` is the path of a network namespace, or empty for a new one.
///
/// # Errors
///
/// [`PlanError`] with the name of the field, if the message is malformed or requests something that a machine cannot
/// do.
pub(crate) fn plan_pod(
    id: &ContainerId,
    options: Option<(&str, &[u8])>,
    network: &str,
    annotations: &HashMap<String, String>,
    sizing: &Sizing,
    host: HostNamespaces,
) -> Result<PodPlan, PlanError> {
    let config = decode(options)?;
    let linux = config.linux.unwrap_or_default();
    let namespaces = linux.security_context.unwrap_or_default().namespace_options;
    refuse_host_namespaces(&namespaces.unwrap_or_default(), host)?;
    let network = parse_network(network)?;
    let limits = match &linux.resources {
        Some(resources) => parse_limits(resources)?,
        None => Limits::from_annotations(annotations)?,
    };
    let mut size_annotations: HashMap<_, _> = config
        .annotations
        .into_iter()
        .filter(|(name, _)| name.starts_with(OWN_ANNOTATIONS))
        .collect();
    size_annotations.extend(annotations.clone());
    Ok(PodPlan {
        size: sizing.size_for_pod(&size_annotations, limits)?,
        network,
        cgroup: cgroup_path(&linux.cgroup_parent, id)?,
        hooks: Hooks::default(),
        shared: PodShared {
            hostname: Some(config.hostname).filter(|name| !name.is_empty()),
            domainname: None,
            sysctls: linux.sysctls.into_iter().collect(),
            shm_size: DEFAULT_SHM_SIZE,
            resolv_conf: Some(
                config
                    .dns_config
                    .map_or(ResolvConf::Host, |dns| ResolvConf::Contents(resolv_conf(&dns))),
            ),
        },
    })
}

fn decode(options: Option<(&str, &[u8])>) -> Result<PodSandboxConfig, PlanError> {
    match options {
        None | Some(("", _)) => Ok(PodSandboxConfig::default()),
        Some((kind, message)) if kind.ends_with(CONFIG_TYPE) => PodSandboxConfig::decode(message)
            .map_err(|error| PlanError::invalid("options", format!("not a valid {CONFIG_TYPE}: {error}"))),
        Some((kind, _)) => Err(PlanError::unsupported(
            "options",
            format!("{kind} is not supported: {CONFIG_TYPE} is expected"),
        )),
    }
}

fn refuse_host_namespaces(namespaces: &NamespaceOption, host: HostNamespaces) -> Result<(), PlanError> {
    if namespaces.network() == NamespaceMode::Node {
        host.refuse_network_unless_pod("hostNetwork")?;
    }
    if namespaces.pid() == NamespaceMode::Node {
        host.refuse_unless_pod("hostPID", "pid")?;
    }
    if namespaces.ipc() == NamespaceMode::Node {
        host.refuse_unless_pod("hostIPC", "ipc")?;
    }
    Ok(())
}

fn parse_network(path: &str) -> Result<Network, PlanError> {
    match path {
        "" => Ok(Network::Loopback),
        path if Path::new(path).is_absolute() => Ok(Network::Namespace(path.into())),
        path => Err(PlanError::invalid(
            "netns_path",
            format!("{path:?} is not an absolute path"),
        )),
    }
}

fn parse_limits(resources: &LinuxContainerResources) -> Result<Limits, PlanError> {
    let period = u64::try_from(resources.cpu_period)
        .map_err(|_| PlanError::invalid("linux.resources.cpu_period", "the period is negative"))?;
    Ok(Limits::new(
        Some(resources.memory_limit_in_bytes),
        Some(resources.cpu_quota),
        Some(period),
    ))
}

/// The path of a sandbox's cgroup below the pod's cgroup `parent`, in systemd's form if `parent` is a slice.
/// containerd's CRI uses the same names (`internal/cri/server/podsandbox`).
fn cgroup_path(parent: &str, id: &ContainerId) -> Result<Option<CgroupPath>, PlanError> {
    let Some(slice) = Path::new(parent).file_name().and_then(OsStr::to_str) else {
        return Ok(None);
    };
    let path = match slice.ends_with(".slice") {
        true => format!("{slice}:cri-containerd:{id}"),
        false => format!("{}/{id}", parent.trim_end_matches('/')),
    };
    CgroupPath::parse(&path).map_err(|reason| PlanError::invalid("linux.cgroup_parent", reason))
}

/// The contents of `/etc/resolv.conf` (resolv.conf(5)).
fn resolv_conf(dns: &DnsConfig) -> String {
    let mut lines = Vec::new();
    if !dns.searches.is_empty() {
        lines.push(format!("search {}\n", dns.searches.join(" ")));
    }
    lines.extend(dns.servers.iter().map(|server| format!("nameserver {server}\n")));
    if !dns.options.is_empty() {
        lines.push(format!("options {}\n", dns.options.join(" ")));
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{DEFAULT_MEMORY, DEFAULT_VCPUS};

    const MIB: u64 = 1 << 20;

    const SIZING: Sizing = Sizing {
        default_memory: DEFAULT_MEMORY,
        default_vcpus: DEFAULT_VCPUS,
        max_memory: 4096 * MIB,
        max_vcpus: 8,
    };

    /// Encodes a length-delimited field.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        bytes.extend(varint(content.len() as u64));
        bytes.extend(content);
        bytes
    }

    /// Encodes a varint field.
    fn number(number: u8, value: i64) -> Vec<u8> {
        [vec![number << 3], varint(value.cast_unsigned())].concat()
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value > 0x7f {
            bytes.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
            value >>= 7;
        }
        bytes.push(u8::try_from(value).unwrap());
        bytes
    }

    /// Encodes an entry of a map.
    fn entry(key: &str, value: &str) -> Vec<u8> {
        [field(1, key.as_bytes()), field(2, value.as_bytes())].concat()
    }

    fn namespaces(network: i64, pid: i64, ipc: i64) -> Vec<u8> {
        let modes = [number(1, network), number(2, pid), number(3, ipc)].concat();
        field(8, &field(2, &field(1, &modes)))
    }

    fn plan_of(message: &[u8], network: &str, annotations: &[(&str, &str)]) -> Result<PodPlan, PlanError> {
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        plan_pod(
            &"pod1".parse().unwrap(),
            Some(("runtime.v1.PodSandboxConfig", message)),
            network,
            &annotations.collect(),
            &SIZING,
            HostNamespaces::Refuse,
        )
    }

    #[test]
    fn pod_is_planned_from_its_config() {
        let dns = [
            field(1, b"10.96.0.10"),
            field(1, b"fd00::a"),
            field(2, b"default.svc"),
            field(2, b"svc"),
            field(3, b"ndots:5"),
        ]
        .concat();
        let resources = [number(1, 100_000), number(2, 250_000), number(4, 512 << 20)].concat();
        let linux = [
            field(1, b"/kubepods/podx"),
            field(3, &entry("net.core.somaxconn", "1024")),
            field(3, &entry("kernel.shm_rmid_forced", "1")),
            field(5, &resources),
        ]
        .concat();
        let message = [
            field(1, &field(1, b"web")),
            field(2, b"web-0"),
            field(4, &dns),
            field(7, &entry("io.containerd.nutshell.vcpus", "2")),
            field(7, &entry("io.kubernetes.cri.sandbox-memory", "1")),
            field(8, &linux),
            vec![12 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0, 13 << 3 | 5, 0, 0, 0, 0],
        ]
        .concat();
        let pod = plan_of(&message, "/run/netns/x", &[]).unwrap();
        assert_eq!((pod.size.boot.memory, pod.size.boot.vcpus), ((512 + 8 + 64) * MIB, 2));
        assert_eq!(pod.network, Network::Namespace("/run/netns/x".into()));
        assert_eq!(pod.cgroup, Some(CgroupPath::Absolute("kubepods/podx/pod1".into())));
        let sysctl = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let file = "search default.svc svc\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n";
        let shared = PodShared {
            hostname: Some("web-0".to_owned()),
            domainname: None,
            sysctls: vec![
                sysctl("kernel.shm_rmid_forced", "1"),
                sysctl("net.core.somaxconn", "1024"),
            ],
            shm_size: 64 * MIB,
            resolv_conf: Some(ResolvConf::Contents(file.to_owned())),
        };
        assert_eq!(pod.shared, shared);
    }

    #[test]
    fn empty_config_is_a_pod_of_default_size_with_a_new_network() {
        let plan = |options| {
            plan_pod(
                &"pod1".parse().unwrap(),
                options,
                "",
                &HashMap::new(),
                &SIZING,
                HostNamespaces::Refuse,
            )
        };
        for options in [
            None,
            Some(("", &b""[..])),
            Some(("runtime.v1.PodSandboxConfig", &b""[..])),
        ] {
            let pod = plan(options).unwrap();
            assert_eq!(
                (pod.size.boot.memory, pod.size.boot.vcpus),
                (DEFAULT_MEMORY, DEFAULT_VCPUS)
            );
            assert_eq!((pod.network, pod.cgroup), (Network::Loopback, None));
            assert_eq!(pod.shared.resolv_conf, Some(ResolvConf::Host));
        }
        let other = plan(Some(("runtime.v1.Other", &b""[..]))).unwrap_err();
        assert!(other.to_string().contains("runtime.v1.Other"), "{other}");
    }

    #[test]
    fn annotations_from_containerd_override_those_of_the_pod() {
        let message = field(7, &entry("io.containerd.nutshell.vcpus", "2"));
        let from_containerd = [
            ("io.containerd.nutshell.vcpus", "3"),
            ("io.kubernetes.cri.sandbox-memory", "268435456"),
        ];
        let size = plan_of(&message, "", &from_containerd).unwrap().size;
        assert_eq!((size.boot.memory, size.boot.vcpus), ((256 + 4 + 64) * MIB, 3));
    }

    #[test]
    fn negative_cpu_period_is_an_error() {
        let resources = number(1, -5);
        let error = plan_of(&field(8, &field(5, &resources)), "", &[]).unwrap_err();
        assert!(error.to_string().contains("cpu_period"), "{error}");
    }

    #[test]
    fn host_namespaces_are_refused_with_the_kubernetes_field_name() {
        for (message, field) in [
            (namespaces(2, 1, 0), "hostNetwork"),
            (namespaces(0, 2, 0), "hostPID"),
            (namespaces(0, 1, 2), "hostIPC"),
        ] {
            let error = plan_of(&message, "", &[]).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
        plan_of(&namespaces(0, 0, 0), "", &[]).unwrap();
    }

    #[test]
    fn cgroup_is_below_the_pods_with_either_driver() {
        let id = "x".parse().unwrap();
        for (parent, path) in [
            ("/kubepods/burstable/podx", Some("kubepods/burstable/podx/x")),
            (
                "/kubepods.slice/kubepods-podx.slice",
                Some("kubepods.slice/kubepods-podx.slice/cri-containerd-x.scope"),
            ),
            ("", None),
            ("/", None),
        ] {
            let expected = path.map(|path| CgroupPath::Absolute(path.into()));
            assert_eq!(cgroup_path(parent, &id).unwrap(), expected, "{parent}");
        }
        let error = cgroup_path("/a--b.slice", &id).unwrap_err().to_string();
        assert!(error.starts_with("linux.cgroup_parent: "), "{error}");
    }

    #[test]
    fn unknown_fields_of_any_type_are_skipped() {
        let unknown = [
            number(15, 7),
            field(15, b"x"),
            vec![15 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0],
            vec![15 << 3 | 5, 0, 0, 0, 0],
            vec![15 << 3 | 3, 1 << 3, 0, 15 << 3 | 4],
        ]
        .concat();
        let linux = [field(1, b"/pod"), unknown.clone()].concat();
        let message = [unknown, field(8, &linux), field(2, b"web-0")].concat();

        let pod = plan_of(&message, "", &[]).unwrap();

        assert_eq!(pod.shared.hostname.as_deref(), Some("web-0"));
        assert_eq!(pod.cgroup, Some(CgroupPath::Absolute("pod/pod1".into())));
    }

    #[test]
    fn malformed_messages_are_errors() {
        let message = [
            field(2, b"web-0"),
            field(8, &[field(3, &entry("a", "b")), number(4, -1)].concat()),
        ]
        .concat();
        PodSandboxConfig::decode(&message[..]).unwrap();
        let whole = [7, message.len()];
        for length in (0..message.len()).filter(|length| !whole.contains(length) && *length > 0) {
            assert!(PodSandboxConfig::decode(&message[..length]).is_err(), "{length} bytes");
        }
        for broken in [
            &[0xff; 11][..],
            &[0x13],
            &[0x12, 2, 0xff, 0xfe],
            &[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f],
        ] {
            assert!(PodSandboxConfig::decode(broken).is_err(), "{broken:?}");
        }
        let nested_groups = [15 << 3 | 3; 10_000];
        assert!(PodSandboxConfig::decode(&nested_groups[..]).is_err());
        let error = plan_of(&[0x12], "", &[]).unwrap_err().to_string();
        assert!(error.starts_with("options: "), "{error}");
        assert!(plan_of(b"", "run/netns", &[]).is_err());
    }
}
