//! The types of a plan. The rest of the shim reads these and never the spec.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use nutshell_protocol::{LayeredRoot, SHARE_PATH};
use oci_spec::runtime::Spec;
use uuid::Uuid;

use super::{CgroupPath, IdMap, Limits, PlanError, PodSize, Size};

/// Size of a pod's `/dev/shm` if nothing else sets it, in bytes: containerd's default (`internal/cri`,
/// `defaultShmSize`).
pub(super) const DEFAULT_SHM_SIZE: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BundlePlan {
    /// A container that runs in a machine.
    Container(Box<Plan>),
    /// The sandbox ("pause") container of a pod. None of its processes run; the shim answers requests for it.
    Sandbox(Box<PodPlan>),
}

/// The resources and settings that a pod needs before its first container is created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodPlan {
    /// The size of the pod's machine.
    pub(crate) size: PodSize,
    /// Never [`Network::Host`].
    pub(crate) network: Network,
    /// The control group of the machine on the host. `None` means that of the shim.
    pub(crate) cgroup: Option<CgroupPath>,
    /// The hooks that run on the host.
    pub(crate) hooks: Hooks,
    pub(crate) shared: PodShared,
}

/// Settings in the guest that the containers of a pod share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodShared {
    pub(crate) hostname: Option<String>,
    /// The NIS domain name.
    pub(crate) domainname: Option<String>,
    /// Kernel parameters and their values, sorted by name.
    pub(crate) sysctls: Vec<(String, String)>,
    /// Size of `/dev/shm` in bytes.
    pub(crate) shm_size: u64,
    /// Set if the runtime has to provide `/etc/resolv.conf` (Sandbox API).
    pub(crate) resolv_conf: Option<ResolvConf>,
}

/// The source of a pod's `/etc/resolv.conf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResolvConf {
    /// A copy of the host's.
    Host,
    /// Written as they are.
    Contents(String),
}

/// The resources and settings of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) placement: Placement,
    pub(crate) spec: GuestSpec,
    /// The source of the root file system.
    pub(crate) root: Root,
    /// Directories and files of the host that the spec's bind mounts refer to, in the order of the spec.
    pub(crate) shares: Vec<Share>,
    pub(crate) network: Network,
    /// The size of the machine of a single container.
    pub(crate) size: Size,
    /// The container's limits, from which the machine of a pod is sized.
    pub(crate) limits: Limits,
    /// The container's first process has a terminal.
    pub(crate) terminal: bool,
    /// Initial columns and rows of the terminal.
    pub(crate) console_size: Option<(u16, u16)>,
    /// The control group of the machine on the host. `None` means that of the shim.
    pub(crate) cgroup: Option<CgroupPath>,
    pub(crate) pid_namespace: PidNamespace,
    /// The `oom_score_adj` of the container's processes, which is that of the machine on the host.
    pub(crate) oom_score_adj: i32,
    /// The hooks that run on the host. The guest's spec contains the others.
    pub(crate) hooks: Hooks,
    /// Lines for the log, one for each setting of the spec that is not applied.
    pub(crate) warnings: Vec<String>,
}

/// The OCI spec for the guest. `root.path` and the sources of bind mounts are paths in the guest, and settings of the
/// host are removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestSpec(Spec);

impl GuestSpec {
    pub(super) fn new(spec: Spec) -> Self {
        Self(spec)
    }

    /// Encodes the spec as JSON. `share_paths` has pairs of a planned [`Share::path`] and the share's path in the file
    /// server's tree, for each share for which they differ.
    ///
    /// # Errors
    ///
    /// If a string of the spec, such as a path, cannot be JSON.
    pub(crate) fn encode(mut self, share_paths: &[(String, String)]) -> Result<Vec<u8>, PlanError> {
        for mount in self.0.mounts_mut().iter_mut().flatten() {
            let planned = mount
                .source()
                .as_deref()
                .and_then(|source| source.strip_prefix(SHARE_PATH).ok());
            let path = share_paths.iter().find(|(path, _)| planned == Some(Path::new(path)));
            if let Some((_, path)) = path {
                mount.set_source(Some(Path::new(SHARE_PATH).join(path)));
            }
        }
        serde_json::to_vec(&self.0).map_err(PlanError::Encode)
    }
}

/// The container's relation to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placement {
    /// A single container, as with `ctr run`: it has no sandbox, and a machine for itself.
    Single,
    /// The container belongs to a pod, and runs in the pod's machine.
    Member {
        /// The id of the pod's sandbox.
        sandbox: String,
    },
}

/// The source of a root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// A directory of the host, shared with the guest.
    Share {
        files: HostFiles,
        /// The guest can only read.
        read_only: bool,
    },
    /// Files of the host, which the guest gets as a disk.
    Disk(RootDisk),
}

/// The files of a root file system that the host mounts, or that are mounted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostFiles {
    /// A directory, with everything that is mounted below it.
    Directory(PathBuf),
    /// Mounts of the snapshotter, to be made in this order. Not empty.
    Mounts(Vec<HostMount>),
    /// An overlay of layers that no guest can write.
    Overlay(HostOverlay),
}

/// An overlay whose upper directory is on the host. Its layers are EROFS images that containerd has made: the host's
/// kernel never mounts a file system that a guest may have written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostOverlay {
    pub(crate) layers: Vec<RootLayer>,
    /// The indexes of the layers whose root directories are the lower ones, topmost first.
    pub(crate) lower: Vec<u32>,
    /// The options `upperdir` and `workdir`, escaped as for mount(2).
    pub(crate) upper: String,
    pub(crate) work: String,
    /// More mount options.
    pub(crate) options: Vec<String>,
}

/// A root file system that the guest mounts from a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RootDisk {
    /// A block device or image file with one file system.
    FileSystem {
        /// The device or file on the host.
        source: PathBuf,
        /// The file system's type.
        filesystem: String,
        /// Mount options for the guest.
        options: Vec<String>,
        /// The guest can only read.
        read_only: bool,
    },
    /// Layers, from which the guest assembles the root.
    Layers {
        layers: Vec<RootLayer>,
        /// Each layer that it names exists.
        root: LayeredRoot,
    },
}

impl RootDisk {
    /// Whether the guest can write to none of its files.
    pub(crate) fn is_read_only(&self) -> bool {
        match self {
            Self::FileSystem { read_only, .. } => *read_only,
            Self::Layers { layers, .. } => layers.iter().all(|layer| layer.read_only),
        }
    }
}

/// A file system in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootLayer {
    /// The device or file on the host.
    pub(crate) source: PathBuf,
    /// The devices or files with the file contents of an EROFS file system that has only metadata, in the order of its
    /// device table.
    pub(crate) devices: Vec<PathBuf>,
    /// The file system's type.
    pub(crate) filesystem: String,
    /// Mount options, without `device=`.
    pub(crate) options: Vec<String>,
    pub(crate) read_only: bool,
    /// How to create the file if it does not exist. `None` if it must exist.
    pub(crate) new_file: Option<NewDiskFile>,
}

/// An image file with an empty file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewDiskFile {
    /// In bytes, not 0.
    pub(crate) size: u64,
    /// The identity of the file system. `None` means a random one.
    pub(crate) uuid: Option<Uuid>,
}

/// A mount of containerd's Task API (`types.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostMount {
    /// The file system's type, or `bind`.
    pub(crate) kind: String,
    pub(crate) source: String,
    /// Relative to the container's root, usually empty.
    pub(crate) target: String,
    /// In the style of fstab.
    pub(crate) options: Vec<String>,
}

/// A directory or file of the host that the guest sees below [`nutshell_protocol::SHARE_PATH`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// The path on the host.
    pub(crate) source: PathBuf,
    /// The path in the file server's tree: `<container id>/<index>` for a container. It is in another place if the
    /// container's pod shares the source already (`shim::share::common_shares`).
    pub(crate) path: String,
    /// Enforced on the host.
    pub(crate) read_only: ReadOnly,
    /// Mounts below the source are shared too (`rbind`).
    pub(crate) recursive: bool,
    /// The mapping of the ids of its files.
    pub(crate) id_map: Option<ShareIdMap>,
}

/// Which mounts of a share are read-only for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadOnly {
    None,
    /// The mount of the share, and not those below it (mount option `ro`).
    Top,
    /// The mount of the share and all below it (mount option `rro`).
    All,
}

/// An id-mapped share (OCI spec, "Mounts": `uidMappings`, `gidMappings`, `idmap`, `ridmap`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareIdMap {
    pub(crate) map: IdMap,
    /// The mapping also applies to mounts below the source.
    pub(crate) recursive: bool,
}

/// The network that a spec requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Network {
    /// A new network namespace: the guest has only its loopback interface.
    Loopback,
    /// The network namespace at a path, with the links that CNI has put into it.
    Namespace(PathBuf),
    /// The host's network, which a machine cannot share: the spec has no network namespace.
    Host,
}

/// The pid namespace that a spec requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    /// The one in the guest's spec, which then always has a new pid namespace.
    Specified,
    /// The pid namespace that the containers of the pod share: hostPID, if the configuration allows it.
    Pod,
    /// The pid namespace of the task with this pid on the host. The spec has the path `/proc/<pid>/ns/pid`, which is
    /// never opened. The task is the sandbox if the pod shares a pid namespace, or the target of an ephemeral
    /// container.
    Task(u32),
}

/// Hooks that run in the runtime's namespaces (OCI spec, "POSIX-platform Hooks").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    /// Run before `create_runtime`. Deprecated in the spec, but still in use.
    pub(crate) prestart: Vec<Hook>,
    /// Run when the container's namespaces exist, before its root is entered.
    pub(crate) create_runtime: Vec<Hook>,
    /// Run after the start of the process.
    pub(crate) poststart: Vec<Hook>,
    /// Run after the container was deleted.
    pub(crate) poststop: Vec<Hook>,
}

/// A program that gets the container's state as JSON on its standard input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    /// The absolute path of the executable on the host.
    pub(crate) path: PathBuf,
    /// The program's arguments, starting with its name.
    pub(crate) arguments: Vec<String>,
    /// The program's environment, `NAME=value` each. It inherits nothing else.
    pub(crate) environment: Vec<String>,
    /// After this time the hook is killed and counts as failed.
    pub(crate) timeout: Option<Duration>,
}
