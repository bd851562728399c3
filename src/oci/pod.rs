//! What a pod needs where its sandbox comes without a bundle: from the `PodSandboxConfig` of
//! Kubernetes' CRI, as containerd's `sandboxer = "shim"` passes it (containerd `plugins/sandbox/controller.go`).
//!
//! The message is protobuf, read here by hand: the numbers of the fields are those of
//! `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`, and all others are passed over.

use std::{collections::HashMap, path::Path};

use super::{
    ContainerId, Hooks, HostNamespaces, Network, PlanError, PodPlan, PodShared, ResolvConf, Sizing,
    namespaces::{HOST_NETWORK, refuse_host},
    plan::DEFAULT_SHM_SIZE,
};

/// The name of the message.
const NAME: &str = "runtime.v1.PodSandboxConfig";

/// What annotations of a pod are for this runtime; the others of a `PodSandboxConfig` are anybody's.
const OWN_ANNOTATIONS: &str = "io.containerd.nutshell.";

/// Plans the pod of the sandbox `id`. `options` are a type and a message; `annotations` are those that
/// containerd has chosen for the runtime; an empty `network` is a new one.
///
/// # Errors
///
/// [`PlanError`], naming the field, where the message is malformed or asks for what a machine cannot do.
pub(crate) fn plan_pod(
    id: &ContainerId,
    options: Option<(&str, &[u8])>,
    network: &str,
    annotations: &HashMap<String, String>,
    sizing: &Sizing,
    host: HostNamespaces,
) -> Result<PodPlan, PlanError> {
    let config = match options {
        Some((name, message)) if name.ends_with(NAME) => Config::parse(message)
            .map_err(|_| PlanError::invalid("options", format!("this is no {NAME}: the message is broken off")))?,
        Some((name, _)) if !name.is_empty() => {
            return Err(PlanError::unsupported("options", format!("{name} is no {NAME}")));
        }
        _ => Config::default(),
    };
    if config.namespaces.network == NODE {
        return Err(PlanError::unsupported("hostNetwork", HOST_NETWORK));
    }
    if config.namespaces.pid == NODE {
        refuse_host("hostPID", "pid", host)?;
    }
    if config.namespaces.ipc == NODE {
        refuse_host("hostIPC", "ipc", host)?;
    }
    let network = match network {
        "" => Network::Loopback,
        path if Path::new(path).is_absolute() => Network::Namespace(path.into()),
        path => {
            return Err(PlanError::invalid(
                "netns_path",
                format!("{path:?} is no absolute path"),
            ));
        }
    };
    Ok(PodPlan {
        size: sizing.of_sandbox(&config.annotations_and(annotations))?,
        network,
        cgroups_path: cgroups_path(&config.cgroup_parent, id),
        hooks: Hooks::default(),
        shared: PodShared {
            hostname: Some(config.hostname).filter(|name| !name.is_empty()),
            domainname: None,
            sysctls: config.sysctls.into_iter().collect(),
            shm_size: DEFAULT_SHM_SIZE,
            resolv_conf: Some(
                config
                    .dns
                    .map_or(ResolvConf::Host, |dns| ResolvConf::Contents(dns.file())),
            ),
        },
    })
}

/// As containerd's CRI makes it for its own sandboxes (`internal/cri/server/podsandbox`): below the
/// pod's group, in systemd's form if that is a slice.
fn cgroups_path(parent: &str, id: &ContainerId) -> Option<String> {
    let slice = Path::new(parent).file_name()?.to_str()?;
    Some(match slice.ends_with(".slice") {
        true => format!("{slice}:cri-containerd:{id}"),
        false => format!("{}/{id}", parent.trim_end_matches('/')),
    })
}

/// `NamespaceMode` of a namespace of the host.
const NODE: u64 = 2;

/// `PodSandboxConfig`, as far as it is used.
#[derive(Debug, Default)]
struct Config {
    hostname: String,
    dns: Option<Dns>,
    annotations: HashMap<String, String>,
    cgroup_parent: String,
    namespaces: Namespaces,
    sysctls: std::collections::BTreeMap<String, String>,
    resources: Option<Resources>,
}

/// `DNSConfig`.
#[derive(Debug, Default)]
struct Dns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

/// `NamespaceOption`: each a `NamespaceMode`.
#[derive(Debug, Default)]
struct Namespaces {
    network: u64,
    pid: u64,
    ipc: u64,
}

/// `LinuxContainerResources`: the sum of the limits of the pod's containers.
#[derive(Debug, Default)]
struct Resources {
    cpu_period: i64,
    cpu_quota: i64,
    memory_limit: i64,
}

impl Config {
    fn parse(message: &[u8]) -> Result<Self, Broken> {
        let mut config = Self::default();
        for field in fields(message) {
            match field? {
                (2, Value::Bytes(hostname)) => config.hostname = text(hostname)?,
                (4, Value::Bytes(dns)) => config.dns.get_or_insert_default().parse(dns)?,
                (7, Value::Bytes(entry)) => config.annotations.extend([map_entry(entry)?]),
                (8, Value::Bytes(linux)) => config.parse_linux(linux)?,
                _ => {}
            }
        }
        Ok(config)
    }

    /// `LinuxPodSandboxConfig`.
    fn parse_linux(&mut self, message: &[u8]) -> Result<(), Broken> {
        for field in fields(message) {
            match field? {
                (1, Value::Bytes(parent)) => self.cgroup_parent = text(parent)?,
                (2, Value::Bytes(security)) => self.parse_security(security)?,
                (3, Value::Bytes(entry)) => self.sysctls.extend([map_entry(entry)?]),
                (5, Value::Bytes(resources)) => self.resources.get_or_insert_default().parse(resources)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// `LinuxSandboxSecurityContext`.
    fn parse_security(&mut self, message: &[u8]) -> Result<(), Broken> {
        for field in fields(message) {
            if let (1, Value::Bytes(namespaces)) = field? {
                for field in fields(namespaces) {
                    match field? {
                        (1, Value::Number(mode)) => self.namespaces.network = mode,
                        (2, Value::Number(mode)) => self.namespaces.pid = mode,
                        (3, Value::Number(mode)) => self.namespaces.ipc = mode,
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// All that bear on the size of the machine, with the sums of limits in the form that a sandbox's
    /// bundle has them in.
    fn annotations_and(&self, chosen: &HashMap<String, String>) -> HashMap<String, String> {
        let own = self
            .annotations
            .iter()
            .filter(|(name, _)| name.starts_with(OWN_ANNOTATIONS));
        let mut all: HashMap<_, _> = own
            .chain(chosen)
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if let Some(resources) = &self.resources {
            for (name, value) in [("period", resources.cpu_period), ("quota", resources.cpu_quota)] {
                all.insert(format!("io.kubernetes.cri.sandbox-cpu-{name}"), value.to_string());
            }
            all.insert(
                "io.kubernetes.cri.sandbox-memory".to_owned(),
                resources.memory_limit.to_string(),
            );
        }
        all
    }
}

impl Dns {
    fn parse(&mut self, message: &[u8]) -> Result<(), Broken> {
        for field in fields(message) {
            match field? {
                (1, Value::Bytes(server)) => self.servers.push(text(server)?),
                (2, Value::Bytes(search)) => self.searches.push(text(search)?),
                (3, Value::Bytes(option)) => self.options.push(text(option)?),
                _ => {}
            }
        }
        Ok(())
    }

    /// `/etc/resolv.conf` (resolv.conf(5)).
    fn file(&self) -> String {
        let mut lines = Vec::new();
        if !self.searches.is_empty() {
            lines.push(format!("search {}\n", self.searches.join(" ")));
        }
        lines.extend(self.servers.iter().map(|server| format!("nameserver {server}\n")));
        if !self.options.is_empty() {
            lines.push(format!("options {}\n", self.options.join(" ")));
        }
        lines.concat()
    }
}

impl Resources {
    fn parse(&mut self, message: &[u8]) -> Result<(), Broken> {
        for field in fields(message) {
            match field? {
                (1, Value::Number(period)) => self.cpu_period = period.cast_signed(),
                (2, Value::Number(quota)) => self.cpu_quota = quota.cast_signed(),
                (4, Value::Number(limit)) => self.memory_limit = limit.cast_signed(),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The bytes are no protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Broken;

/// The value of a field, as far as its wire type tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value<'a> {
    /// A number of any integer type, in two's complement.
    Number(u64),
    /// Text, bytes or a message.
    Bytes(&'a [u8]),
    /// What nothing here has: numbers of fixed length.
    Other,
}

/// The fields of a message in their order, up to the first that is broken
/// (protobuf.dev/programming-guides/encoding).
fn fields(mut message: &[u8]) -> impl Iterator<Item = Result<(u64, Value<'_>), Broken>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let field = take_field(&mut message);
        if field.is_none() {
            message = &[];
        }
        Some(field.ok_or(Broken))
    })
}

fn take_field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let tag = take_number(rest)?;
    let value = match tag & 7 {
        0 => Value::Number(take_number(rest)?),
        1 => take_bytes(rest, 8).map(|_| Value::Other)?,
        2 => {
            let length = take_number(rest)?;
            Value::Bytes(take_bytes(rest, length)?)
        }
        5 => take_bytes(rest, 4).map(|_| Value::Other)?,
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn take_number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn take_bytes<'a>(rest: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (bytes, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = after;
    Some(bytes)
}

fn text(bytes: &[u8]) -> Result<String, Broken> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Broken)
}

fn map_entry(message: &[u8]) -> Result<(String, String), Broken> {
    let mut entry = (String::new(), String::new());
    for field in fields(message) {
        match field? {
            (1, Value::Bytes(key)) => entry.0 = text(key)?,
            (2, Value::Bytes(value)) => entry.1 = text(value)?,
            _ => {}
        }
    }
    Ok(entry)
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

    /// A field of a length.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        bytes.extend(varint(content.len() as u64));
        bytes.extend(content);
        bytes
    }

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
    fn config_of_a_pod_is_planned() {
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
        assert_eq!(pod.cgroups_path.as_deref(), Some("/kubepods/podx/pod1"));
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
    fn nothing_said_is_a_pod_of_default_size_with_a_network_of_its_own() {
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
            assert_eq!((pod.network, pod.cgroups_path), (Network::Loopback, None));
            assert_eq!(pod.shared.resolv_conf, Some(ResolvConf::Host));
        }
        let other = plan(Some(("runtime.v1.Other", &b""[..]))).unwrap_err();
        assert!(other.to_string().contains("runtime.v1.Other"), "{other}");
    }

    #[test]
    fn annotations_that_containerd_chose_count_more_than_the_pods() {
        let message = field(7, &entry("io.containerd.nutshell.vcpus", "2"));
        let chosen = [
            ("io.containerd.nutshell.vcpus", "3"),
            ("io.kubernetes.cri.sandbox-memory", "268435456"),
        ];
        let size = plan_of(&message, "", &chosen).unwrap().size;
        assert_eq!((size.boot.memory, size.boot.vcpus), ((256 + 4 + 64) * MIB, 3));
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_the_name_of_their_field() {
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
    fn groups_of_both_drivers_are_below_the_pods() {
        let id = "x".parse().unwrap();
        for (parent, path) in [
            ("/kubepods/burstable/podx", Some("/kubepods/burstable/podx/x")),
            (
                "/kubepods.slice/kubepods-podx.slice",
                Some("kubepods-podx.slice:cri-containerd:x"),
            ),
            ("", None),
            ("/", None),
        ] {
            assert_eq!(cgroups_path(parent, &id).as_deref(), path, "{parent}");
        }
    }

    #[test]
    fn broken_messages_are_errors_wherever_they_end() {
        let message = [
            field(2, b"web-0"),
            field(8, &[field(3, &entry("a", "b")), number(4, -1)].concat()),
        ]
        .concat();
        Config::parse(&message).unwrap();
        let whole = [7, message.len()];
        for length in (0..message.len()).filter(|length| !whole.contains(length) && *length > 0) {
            assert!(Config::parse(&message[..length]).is_err(), "{length} bytes");
        }
        for broken in [
            &[0xff; 11][..],
            &[0x13],
            &[0x12, 2, 0xff, 0xfe],
            &[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f],
        ] {
            assert!(Config::parse(broken).is_err(), "{broken:?}");
        }
        assert!(plan_of(&[0x12], "", &[]).is_err());
        assert!(plan_of(b"", "run/netns", &[]).is_err());
    }
}
