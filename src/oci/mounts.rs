//! The spec's mounts to the guest's.
//!
//! A machine has kernel file systems of its own, and sees a host directory or file only through the
//! pod's share, so each bind mount is one of: a [`Share`], the guest's own path of the same name, or
//! an error that names it.

use std::path::{Component, Path, PathBuf};

use nutshell_protocol::SHARE_PATH;
use oci_spec::runtime::Mount;

use super::{
    ContainerId, HostNamespaces, IdMap, Inspect, PlanError, Share, ShareIdMap, SourceKind, devices,
    namespaces::refuse_host, plan::DEFAULT_SHM_SIZE,
};

/// File systems that have no source on the host: the guest mounts its own.
const GUEST_FILESYSTEMS: [&str; 11] = [
    "bpf",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "mqueue",
    "proc",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// Where the agent has the one tmpfs that the containers of a pod share.
const POD_SHM: &str = "/dev/shm";

/// Of a container's own `/dev/shm`, beside its size: containerd's default spec (`pkg/oci`) has the same.
const SHM_OPTIONS: [&str; 4] = ["nosuid", "noexec", "nodev", "mode=1777"];

#[derive(Debug, Default)]
pub(super) struct Mounts {
    pub(super) guest: Vec<Mount>,
    pub(super) shares: Vec<Share>,
}

/// Translates the mounts of one container.
pub(super) struct Translator<'a> {
    pub(super) bundle: &'a Path,
    pub(super) id: &'a ContainerId,
    /// The container shares `/dev/shm` with its pod.
    pub(super) in_pod: bool,
    /// What the host's `/dev/shm` means.
    pub(super) host: HostNamespaces,
    /// Of the container's user namespace.
    pub(super) ids: Option<&'a IdMap>,
    pub(super) inspect: Inspect<'a>,
}

impl Translator<'_> {
    pub(super) fn translate(&self, mounts: Vec<Mount>) -> Result<Mounts, PlanError> {
        let mut translated = Mounts::default();
        for mut mount in mounts {
            let ids = self.take_ids(&mut mount)?;
            if is_bind(&mount) {
                self.bind(&mut mount, ids, &mut translated.shares)?;
            } else {
                refuse_ids(&mount, ids.as_ref(), "the guest's own")?;
                if self.in_pod && is_default_shm(&mount) {
                    set_bind(&mut mount, POD_SHM.into(), &["bind", "rw"]);
                } else {
                    kernel(&mut mount)?;
                }
            }
            translated.guest.push(mount);
        }
        Ok(translated)
    }

    /// The mapping that a mount asks for, which the host does: the guest's mount is a plain one.
    fn take_ids(&self, mount: &mut Mount) -> Result<Option<ShareIdMap>, PlanError> {
        let invalid = |mount: &Mount, reason: String| PlanError::invalid(field(mount), reason);
        let own = IdMap::from_spec(mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref())
            .map_err(|reason| invalid(mount, reason))?;
        let wanted = options(mount).any(|option| matches!(option, "idmap" | "ridmap"));
        let map = match (own, wanted) {
            (None, false) => return Ok(None),
            (Some(map), _) => map,
            (None, true) => self.ids.cloned().ok_or_else(|| {
                let reason = "idmap needs a mapping, of the mount or of the container's user namespace";
                invalid(mount, reason.to_owned())
            })?,
        };
        let recursive = options(mount).any(|option| option == "ridmap");
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap"));
        mount
            .set_options(Some(options))
            .set_uid_mappings(None)
            .set_gid_mappings(None);
        Ok(Some(ShareIdMap { map, recursive }))
    }

    fn bind(&self, mount: &mut Mount, ids: Option<ShareIdMap>, shares: &mut Vec<Share>) -> Result<(), PlanError> {
        refuse_propagation_to_the_host(mount)?;
        let source = mount
            .source()
            .as_deref()
            .ok_or_else(|| PlanError::invalid(field(mount), "a bind mount needs a source"))?;
        // OCI spec, "Mounts": a relative source of a bind mount is relative to the bundle.
        let source = clean(&self.bundle.join(source));
        let destination = clean(mount.destination());
        if destination == Path::new(POD_SHM) && self.shm(mount, &source)? {
            return Ok(());
        }
        if destination == Path::new("/dev/mqueue") {
            set_kernel(mount, "mqueue", &["nosuid", "noexec", "nodev"]);
            return Ok(());
        }
        let guest = match self.guests_own(mount, &source)? {
            Some(path) => {
                refuse_ids(mount, ids.as_ref(), "the guest's own")?;
                path
            }
            None => self.share(mount, source, ids, shares),
        };
        set_bind(mount, guest, &[]);
        Ok(())
    }

    /// Shared memory that somebody made on the host for this container or its pod is memory of the
    /// guest: nobody on the host has a part in it, and processes could not share it through a file
    /// server. `false` for a folder of another kind.
    fn shm(&self, mount: &mut Mount, source: &Path) -> Result<bool, PlanError> {
        let size = if source == Path::new(POD_SHM) {
            if self.in_pod {
                refuse_host("hostIPC", "ipc", self.host)?;
            }
            DEFAULT_SHM_SIZE
        } else {
            match self.look(source)? {
                SourceKind::SharedMemory { size } => size,
                _ => return Ok(false),
            }
        };
        if self.in_pod {
            set_bind(mount, POD_SHM.into(), &[]);
        } else {
            let size = format!("size={size}");
            let read_only = is_read_only(mount).then_some("ro");
            let options: Vec<&str> = SHM_OPTIONS
                .into_iter()
                .chain([size.as_str()])
                .chain(read_only)
                .collect();
            set_kernel(mount, "tmpfs", &options);
        }
        Ok(true)
    }

    fn look(&self, source: &Path) -> Result<SourceKind, PlanError> {
        (self.inspect)(source).map_err(|error| PlanError::Source {
            path: source.to_owned(),
            source: error,
        })
    }

    /// The path in the guest of a source that the guest has itself; `None` if the host's must be
    /// shared.
    fn guests_own(&self, mount: &Mount, source: &Path) -> Result<Option<PathBuf>, PlanError> {
        if source.starts_with("/proc") || source.starts_with("/sys") {
            return Ok(Some(source.to_owned()));
        }
        let kind = self.look(source)?;
        let unsupported = |reason| {
            Err(PlanError::unsupported(
                field(mount),
                format!("{} {reason}", source.display()),
            ))
        };
        match kind {
            // The tmpfs of shared memory lies below /dev and is an ordinary directory all the same.
            SourceKind::Tree if source.starts_with("/dev") && !source.starts_with(POD_SHM) => {
                Ok(Some(source.to_owned()))
            }
            SourceKind::Tree | SourceKind::SharedMemory { .. } => Ok(None),
            SourceKind::Kernel => {
                unsupported("leads to a file system of the host's kernel; name it below /proc or /sys")
            }
            SourceKind::HugePages => unsupported("is on a hugetlbfs: huge pages are not supported yet"),
            SourceKind::Character { major, minor } => match devices::character_device(major, minor) {
                Some(path) => Ok(Some(path.into())),
                None => Err(devices::no_such_device(&format!(
                    "{}: {}",
                    field(mount),
                    source.display()
                ))),
            },
            SourceKind::Block => Err(devices::no_such_device(&format!(
                "{}: {}",
                field(mount),
                source.display()
            ))),
            SourceKind::Socket => unsupported("is a socket: sockets of the host are not supported yet"),
            SourceKind::Fifo => unsupported("is a named pipe: pipes of the host are not supported yet"),
        }
    }

    fn share(&self, mount: &Mount, source: PathBuf, ids: Option<ShareIdMap>, shares: &mut Vec<Share>) -> PathBuf {
        let path = format!("{}/{}", self.id, shares.len());
        let guest = Path::new(SHARE_PATH).join(&path);
        shares.push(Share {
            source,
            path,
            read_only: is_read_only(mount),
            recursive: options(mount).any(|option| option == "rbind"),
            id_map: ids,
        });
        guest
    }
}

/// The size of a pod's shared memory, from the mounts of its sandbox: containerd's CRI makes a tmpfs
/// on the host for it.
pub(super) fn shared_memory(mounts: &[Mount], inspect: Inspect<'_>) -> u64 {
    let source = mounts
        .iter()
        .filter(|mount| clean(mount.destination()) == Path::new(POD_SHM))
        .find_map(|mount| mount.source().as_deref());
    match source.map(inspect) {
        Some(Ok(SourceKind::SharedMemory { size })) => size,
        _ => DEFAULT_SHM_SIZE,
    }
}

/// What containerd's default spec (`pkg/oci`) has for a container that shares memory with nobody. Its
/// CRI leaves that in place in a pod, where it leaves shared memory to the runtime.
fn is_default_shm(mount: &Mount) -> bool {
    clean(mount.destination()) == Path::new(POD_SHM)
        && mount.typ().as_deref() == Some("tmpfs")
        && mount.source().as_deref() == Some(Path::new("shm"))
        && options(mount).any(|option| option == "size=65536k")
}

fn kernel(mount: &mut Mount) -> Result<(), PlanError> {
    let kind = match mount.typ().as_deref() {
        Some("hugetlbfs") => {
            return Err(PlanError::unsupported(field(mount), "huge pages are not supported yet"));
        }
        // The guest has cgroup v2 only; libcontainer knows it by this name.
        Some("cgroup2") => "cgroup".to_owned(),
        Some(kind) if GUEST_FILESYSTEMS.contains(&kind) => kind.to_owned(),
        Some(kind) => {
            let reason = format!("file system type {kind:?} is not supported as a mount");
            return Err(PlanError::unsupported(field(mount), reason));
        }
        None => return Err(PlanError::invalid(field(mount), "neither a type nor a bind mount")),
    };
    if mount.source().is_none() {
        mount.set_source(Some(kind.as_str().into()));
    }
    mount.set_typ(Some(kind));
    Ok(())
}

fn set_kernel(mount: &mut Mount, kind: &str, options: &[&str]) {
    mount.set_typ(Some(kind.to_owned()));
    mount.set_source(Some(kind.into()));
    mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
}

/// `replaced`, if there are any, take the place of the options.
fn set_bind(mount: &mut Mount, source: PathBuf, replaced: &[&str]) {
    if !replaced.is_empty() {
        mount.set_options(Some(replaced.iter().map(|option| (*option).to_owned()).collect()));
    }
    if !options(mount).any(|option| matches!(option, "bind" | "rbind")) {
        let mut options = mount.options().clone().unwrap_or_default();
        options.push("bind".to_owned());
        mount.set_options(Some(options));
    }
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source));
}

fn refuse_ids(mount: &Mount, ids: Option<&ShareIdMap>, whose: &str) -> Result<(), PlanError> {
    match ids {
        None => Ok(()),
        Some(_) => {
            let reason = format!("ids are mapped in directories and files of the host, and this is {whose}");
            Err(PlanError::unsupported(field(mount), reason))
        }
    }
}

fn refuse_propagation_to_the_host(mount: &Mount) -> Result<(), PlanError> {
    match options(mount).find(|option| matches!(*option, "shared" | "rshared")) {
        None => Ok(()),
        Some(option) => Err(PlanError::unsupported(
            field(mount),
            format!("mounts of a machine do not reach its host (propagation {option:?}, \"Bidirectional\")"),
        )),
    }
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|option| matches!(option, "bind" | "rbind"))
}

/// The last of the options counts, as for mount(8).
fn is_read_only(mount: &Mount) -> bool {
    options(mount)
        .filter(|option| matches!(*option, "ro" | "rro" | "rw"))
        .last()
        .is_some_and(|option| option != "rw")
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn field(mount: &Mount) -> String {
    format!("mount {}", mount.destination().display())
}

/// Drops `.` and resolves `..` by the text alone, so that what a path starts with says where it is.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::Normal(name) => cleaned.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
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
            _ => SourceKind::Tree,
        })
    }

    fn translate(in_pod: bool, mounts: Value) -> Result<Mounts, PlanError> {
        let translator = Translator {
            bundle: Path::new("/bundle"),
            id: &"c1".parse().unwrap(),
            in_pod,
            host: HostNamespaces::Refuse,
            ids: None,
            inspect: &inspect,
        };
        translator.translate(serde_json::from_value(mounts).unwrap())
    }

    fn guest(mounts: &Mounts) -> Value {
        serde_json::to_value(&mounts.guest).unwrap()
    }

    #[test]
    fn trees_of_the_host_are_shared_by_index() {
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
            share("/srv/data", "c1/0", false, true),
            share("/bundle/hosts", "c1/1", true, false),
            share("/dev/shm/y", "c1/2", true, false),
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

    #[test]
    fn id_mapped_mounts_are_the_hosts_matter() {
        let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        let own = IdMap::from_options(&["uidmap=0:7:1".to_owned(), "gidmap=0:7:1".to_owned()]).unwrap();
        let translator = Translator {
            bundle: Path::new("/bundle"),
            id: &"c1".parse().unwrap(),
            in_pod: false,
            host: HostNamespaces::Refuse,
            ids: own.as_ref(),
            inspect: &inspect,
        };
        let mounts = json!([
            {"destination": "/a", "type": "bind", "source": "/a", "uidMappings": mapping, "gidMappings": mapping},
            {"destination": "/b", "type": "bind", "source": "/b", "options": ["rbind", "ridmap"]},
        ]);

        let translated = translator.translate(serde_json::from_value(mounts).unwrap()).unwrap();

        let ids: Vec<_> = translated
            .shares
            .iter()
            .map(|share| share.id_map.as_ref().unwrap())
            .collect();
        assert_eq!(
            (ids[0].map.uids.to_string().as_str(), ids[0].recursive),
            ("0 1000 1\n", false)
        );
        assert_eq!(
            (ids[1].map.uids.to_string().as_str(), ids[1].recursive),
            ("0 7 1\n", true)
        );
        for (mount, options) in [(0, json!(["bind"])), (1, json!(["rbind"]))] {
            let mount = &guest(&translated)[mount];
            assert_eq!((&mount["options"], &mount["uidMappings"]), (&options, &Value::Null));
        }
    }

    #[test]
    fn what_the_guest_has_itself_is_bound_from_there() {
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
    fn shared_memory_is_the_containers_own_or_the_pods() {
        let spec = json!([{"destination": "/dev/shm/", "type": "bind", "source": "/run/containerd/sandboxes/p/shm",
                           "options": ["rbind", "ro"]}]);
        let single = translate(false, spec.clone()).unwrap();
        assert_eq!(guest(&single)[0]["type"], "tmpfs");
        let options = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=1048576", "ro"]);
        assert_eq!(guest(&single)[0]["options"], options);
        let member = translate(true, spec).unwrap();
        assert_eq!(guest(&member)[0]["type"], "bind");
        assert_eq!(guest(&member)[0]["source"], POD_SHM);
        assert_eq!((single.shares, member.shares), (vec![], vec![]));
    }

    #[test]
    fn shared_memory_of_the_host_is_refused_in_a_pod_and_any_folder_is_a_share() {
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
    fn default_shared_memory_is_the_pods_and_one_that_is_asked_for_the_containers() {
        let tmpfs = |source, size| json!([{"destination": "/dev/shm", "type": "tmpfs", "source": source, "options": ["nosuid", size]}]);
        let default = translate(true, tmpfs("shm", "size=65536k")).unwrap();
        let expected = json!({"destination": "/dev/shm", "type": "bind", "source": POD_SHM, "options": ["bind", "rw"]});
        assert_eq!(guest(&default)[0], expected);
        for (in_pod, source, size) in [
            (true, "shm", "size=1g"),
            (true, "tmpfs", "size=65536k"),
            (false, "shm", "size=65536k"),
        ] {
            let own = translate(in_pod, tmpfs(source, size)).unwrap();
            assert_eq!(guest(&own)[0]["type"], "tmpfs", "{source} {size}");
        }
    }

    #[test]
    fn size_of_the_pods_shared_memory_is_that_of_the_hosts_tmpfs() {
        for (source, size) in [
            ("/run/containerd/sandboxes/p/shm", 1 << 20),
            ("/dev/shm", DEFAULT_SHM_SIZE),
        ] {
            let mounts = json!([{"destination": "/dev/shm", "type": "bind", "source": source}]);
            let mounts: Vec<Mount> = serde_json::from_value(mounts).unwrap();
            assert_eq!(shared_memory(&mounts, &inspect), size);
        }
        assert_eq!(shared_memory(&[], &inspect), DEFAULT_SHM_SIZE);
    }

    #[test]
    fn kernel_file_systems_stay_and_cgroup_has_libcontainers_name() {
        let mqueue =
            json!({"destination": "/dev/mqueue", "type": "bind", "source": "/dev/mqueue", "options": ["bind"]});
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
    fn what_a_machine_cannot_mount_is_an_error_that_names_destination_and_reason() {
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
                json!({"type": "bind", "source": "/a", "options": ["idmap"]}),
                "idmap needs a mapping",
            ),
            (
                json!({"type": "bind", "source": "/a", "uidMappings": mapping}),
                "users and groups",
            ),
            (
                json!({"type": "tmpfs", "uidMappings": mapping, "gidMappings": mapping}),
                "ids are mapped in",
            ),
            (
                json!({"type": "bind", "source": "/proc/fs", "uidMappings": mapping, "gidMappings": mapping}),
                "ids are mapped in",
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
}
