//! What a container needs, decided once from its bundle and the mounts that containerd sent. The
//! rest of the shim reads these types and never the spec.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{IdMap, Limits, PodSize, Size};

/// What a bundle is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BundlePlan {
    /// A container that runs in a machine.
    Container(Box<Plan>),
    /// The sandbox ("pause") container of a pod, which the shim answers for: nothing of it runs.
    Sandbox(Box<PodPlan>),
}

/// What a pod needs, before any of its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodPlan {
    /// The size of its machine.
    pub(crate) size: PodSize,
    /// Its network; never the host's.
    pub(crate) network: Network,
    /// The cgroup path, as the spec has it; names the host cgroup of the machine.
    pub(crate) cgroups_path: Option<String>,
    /// Hooks that run on the host.
    pub(crate) hooks: Hooks,
    /// What its containers share in the guest.
    pub(crate) shared: PodShared,
}

/// What the containers of a pod share in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodShared {
    /// The host name.
    pub(crate) hostname: Option<String>,
    /// The NIS domain name.
    pub(crate) domainname: Option<String>,
    /// Kernel parameters by name, in the order of their names.
    pub(crate) sysctls: Vec<(String, String)>,
    /// The size of `/dev/shm`, in bytes.
    pub(crate) shm_size: u64,
    /// The contents of `/etc/resolv.conf`, where that is left to the runtime (the Sandbox API).
    pub(crate) resolv_conf: Option<ResolvConf>,
}

/// Who looks names up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResolvConf {
    /// Whoever does so for the host.
    Host,
    /// What `/etc/resolv.conf` is to say.
    Contents(String),
}

/// The size of a pod's `/dev/shm` where nobody says another, in bytes: containerd's (`internal/cri`,
/// `defaultShmSize`).
pub(crate) const DEFAULT_SHM_SIZE: u64 = 64 << 20;

/// What namespaces of the host (hostPID, hostIPC) mean for a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum HostNamespaces {
    /// Nothing that a machine could give: an error.
    #[default]
    #[serde(rename = "refuse")]
    Refuse,
    /// The pod's: its containers share them.
    #[serde(rename = "pod")]
    Pod,
}

/// What a container needs from its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Whether the container stands alone or belongs to a pod.
    pub(crate) placement: Placement,
    /// The OCI spec for the guest as JSON: `root.path` and the sources of bind mounts are guest
    /// paths, host-only settings are gone.
    pub(crate) spec: Vec<u8>,
    /// Where the root file system comes from.
    pub(crate) root: Root,
    /// Host directories and files that the spec's bind mounts name, in the order of the spec.
    pub(crate) shares: Vec<Share>,
    /// The network that the spec asks for.
    pub(crate) network: Network,
    /// The size that a machine for this container alone has.
    pub(crate) size: Size,
    /// What it is bounded by in the machine of a pod.
    pub(crate) limits: Limits,
    /// The first process has a terminal.
    pub(crate) terminal: bool,
    /// The terminal's first size: columns, rows.
    pub(crate) console_size: Option<(u16, u16)>,
    /// The cgroup path of the spec, as it stands there; names the host cgroup of the machine.
    pub(crate) cgroups_path: Option<String>,
    /// The pid namespace that the spec asks for.
    pub(crate) pid_namespace: PidNamespace,
    /// Hooks that run on the host; the others stay in the guest's spec.
    pub(crate) hooks: Hooks,
    /// What the spec asks for and a machine does not do, and need not fail for: one line each, for
    /// the log.
    pub(crate) warnings: Vec<String>,
}

/// How a container relates to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placement {
    /// A pod of one: `ctr run` and its like.
    Single,
    /// A container of the pod whose sandbox has this id.
    Member {
        /// The sandbox's id.
        sandbox: String,
    },
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// Mounts to make on the host, in order, at one directory that is then shared with the guest.
    Share {
        /// The mounts of the snapshotter.
        mounts: Vec<HostMount>,
        /// An existing directory to share instead where `mounts` is empty.
        directory: Option<PathBuf>,
        /// The guest may only read.
        read_only: bool,
    },
    /// A block device or image file, given to the guest as a disk.
    Disk {
        /// The device or file on the host.
        source: PathBuf,
        /// The file system's type.
        filesystem: String,
        /// Mount options for the guest.
        options: Vec<String>,
        /// The guest may only read.
        read_only: bool,
    },
}

/// A mount as containerd's Task API carries it (`types.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostMount {
    /// The file system's type, or `bind`.
    pub(crate) kind: String,
    /// Source.
    pub(crate) source: String,
    /// Relative to the root of the container, mostly empty.
    pub(crate) target: String,
    /// Options as fstab has them.
    pub(crate) options: Vec<String>,
}

/// A host directory or file that the guest sees below [`nutshell_protocol::SHARE_PATH`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// The host path that the spec names.
    pub(crate) source: PathBuf,
    /// The path below the share, `<container id>/<index>`: a directory's tree or the one file.
    pub(crate) path: String,
    /// The guest may only read; enforced on the host.
    pub(crate) read_only: bool,
    /// Mounts below the source are shared too (`rbind`).
    pub(crate) recursive: bool,
    /// Which ids of its files the guest sees as which.
    pub(crate) id_map: Option<ShareIdMap>,
}

/// An id-mapped share (OCI spec, "Mounts": `uidMappings`, `gidMappings`, `idmap`, `ridmap`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareIdMap {
    /// The mapping.
    pub(crate) map: IdMap,
    /// It holds for the mounts below the source too.
    pub(crate) recursive: bool,
}

/// The network that a spec asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Network {
    /// A namespace of its own without a path: loopback in the guest.
    Loopback,
    /// The namespace at a path, with what CNI put there.
    Namespace(PathBuf),
    /// No network namespace in the spec: the host's network, which a machine cannot share.
    Host,
}

/// The pid namespace that a spec asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    /// What is in the guest's spec: a new one, or none, which is the machine's.
    Specified,
    /// The one that containers of the pod share: hostPID, where that is accepted.
    Pod,
    /// That of the task with this host pid: the path `/proc/<pid>/ns/pid` in the spec of a pod's
    /// member (shared with the sandbox, or an ephemeral container's target). Never opened.
    Task(u32),
}

/// Hooks that the runtime runs in its own namespaces (OCI spec, "POSIX-platform Hooks").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    /// Before `create_runtime`; deprecated in the spec, still in use.
    pub(crate) prestart: Vec<Hook>,
    /// After the container's namespaces exist, before its root is entered.
    pub(crate) create_runtime: Vec<Hook>,
    /// After the process was started.
    pub(crate) poststart: Vec<Hook>,
    /// After the container was deleted.
    pub(crate) poststop: Vec<Hook>,
}

/// A program to run with the container's state as JSON on its standard input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    /// The executable, an absolute host path.
    pub(crate) path: PathBuf,
    /// Its arguments, the first being its own name.
    pub(crate) arguments: Vec<String>,
    /// Its whole environment, `NAME=value` each.
    pub(crate) environment: Vec<String>,
    /// After which it is killed and has failed.
    pub(crate) timeout: Option<Duration>,
}
