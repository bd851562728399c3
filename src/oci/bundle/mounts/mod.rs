//! Translates the mounts of a spec for the guest.
//!
//! A machine has its own kernel file systems, and it sees a directory or file of the host only through the pod's file
//! server. So the source of a bind mount becomes a [`Share`], or the same path in the guest, or an error.
//!
//! Belongs here: the translation of mounts, with shared memory in [`shm`] and access to one mount of a spec in
//! [`spec_mount`]. Does not belong here: the root file system (`rootfs`), and mounting. Called by the plan of a
//! container.

mod shm;
mod spec_mount;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
};

use nutshell_protocol::SHARE_PATH;
use oci_spec::runtime::Mount;

use self::{
    shm::SHM_PATH,
    spec_mount::{add_option, normalize, remove_read_only, set_bind, set_filesystem},
};
pub(super) use self::{
    shm::pod_shm_size,
    spec_mount::{field_name, is_bind, options, read_only},
};
use super::devices;
use crate::oci::{
    ContainerId, HostNamespaces, IdMap, Inspect, MountRestrictions, PlanError, ReadOnly, Share, ShareIdMap, SourceKind,
    plan::DEFAULT_SHM_SIZE,
};

/// File systems without a source on the host: the guest mounts its own.
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

/// The mounts of a container.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    /// The mounts in the guest's spec.
    pub(super) guest: Vec<Mount>,
    /// The directories and files of the host that `guest` refers to.
    pub(super) shares: Vec<Share>,
}

/// Translates the mounts of one container.
pub(super) struct MountTranslator<'a> {
    pub(super) bundle: &'a Path,
    pub(super) id: &'a ContainerId,
    /// The container shares `/dev/shm` with its pod.
    pub(super) in_pod: bool,
    /// Whether a member's bind mount of the host's `/dev/shm` is refused, or replaced by the pod's.
    pub(super) host: HostNamespaces,
    /// The mapping of the container's user namespace.
    pub(super) id_map: Option<&'a IdMap>,
    pub(super) inspect: &'a dyn Inspect,
}

impl MountTranslator<'_> {
    pub(super) fn translate(&self, mounts: Vec<Mount>) -> Result<Mounts, PlanError> {
        let mut translated = Mounts::default();
        for mut mount in mounts {
            let id_map = self.take_id_map(&mut mount)?;
            if is_bind(&mount) {
                self.translate_bind(&mut mount, id_map, &mut translated.shares)?;
            } else {
                refuse_id_map(&mount, id_map.as_ref())?;
                if self.in_pod && shm::is_default(&mount) {
                    shm::bind_pod_shm(&mut mount);
                } else {
                    translate_filesystem(&mut mount)?;
                }
            }
            translated.guest.push(mount);
        }
        Ok(translated)
    }

    /// Takes the id mapping out of a mount: the host maps the ids, so the guest's mount needs no mapping.
    fn take_id_map(&self, mount: &mut Mount) -> Result<Option<ShareIdMap>, PlanError> {
        let invalid = |mount: &Mount, reason: String| PlanError::invalid(field_name(mount), reason);
        let explicit = IdMap::from_spec(mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref())
            .map_err(|reason| invalid(mount, reason))?;
        let is_requested = options(mount).any(|option| matches!(option, "idmap" | "ridmap"));
        let map = match (explicit, is_requested) {
            (None, false) => return Ok(None),
            (Some(map), _) => map,
            (None, true) => self.id_map.cloned().ok_or_else(|| {
                let reason = "idmap needs a mapping: set uidMappings and gidMappings of the mount, or give the container \
                              a user namespace";
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

    fn translate_bind(
        &self,
        mount: &mut Mount,
        id_map: Option<ShareIdMap>,
        shares: &mut Vec<Share>,
    ) -> Result<(), PlanError> {
        refuse_shared_propagation(mount)?;
        let source = mount
            .source()
            .as_deref()
            .ok_or_else(|| PlanError::invalid(field_name(mount), "a bind mount needs a source"))?;
        // OCI spec, "Mounts": a relative source of a bind mount is relative to the bundle.
        let source = normalize(&self.bundle.join(source));
        let destination = normalize(mount.destination());
        if destination == Path::new(SHM_PATH)
            && let Some(size) = self.shm_size(&source)?
        {
            if self.in_pod {
                set_bind(mount, SHM_PATH.into());
            } else {
                shm::mount_private_shm(mount, size);
            }
            return Ok(());
        }
        if destination == Path::new("/dev/mqueue") {
            set_filesystem(mount, "mqueue", &["nosuid", "noexec", "nodev"]);
            return Ok(());
        }
        let guest_source = match self.find_in_guest(mount, &source)? {
            Some(path) => {
                refuse_id_map(mount, id_map.as_ref())?;
                path
            }
            None => self.add_share(mount, source, id_map, shares)?,
        };
        set_bind(mount, guest_source);
        Ok(())
    }

    /// The size in bytes of the shared memory that containerd, or the host itself, has at `source`. `None` if it is a
    /// directory of another kind.
    fn shm_size(&self, source: &Path) -> Result<Option<u64>, PlanError> {
        if source == Path::new(SHM_PATH) {
            if self.in_pod {
                self.host.refuse_unless_pod("hostIPC", "ipc")?;
            }
            return Ok(Some(DEFAULT_SHM_SIZE));
        }
        match self.inspect(source)? {
            SourceKind::SharedMemory { size } => Ok(Some(size)),
            _ => Ok(None),
        }
    }

    fn inspect(&self, source: &Path) -> Result<SourceKind, PlanError> {
        self.inspect.kind(source).map_err(source_error(source))
    }

    /// The path in the guest, if the guest has its own file or directory for `source`. `None` if it must be shared from
    /// the host.
    fn find_in_guest(&self, mount: &Mount, source: &Path) -> Result<Option<PathBuf>, PlanError> {
        if source.starts_with("/proc") || source.starts_with("/sys") {
            return Ok(Some(source.to_owned()));
        }
        let unsupported = |reason| {
            Err(PlanError::unsupported(
                field_name(mount),
                format!("{} {reason}", source.display()),
            ))
        };
        let no_such_device = || devices::no_such_device(&format!("{}: {}", field_name(mount), source.display()));
        match self.inspect(source)? {
            // Directories below /dev/shm are ordinary ones, and the guest does not have them.
            SourceKind::Directory | SourceKind::File if source.starts_with("/dev") && !source.starts_with(SHM_PATH) => {
                Ok(Some(source.to_owned()))
            }
            SourceKind::Directory | SourceKind::SharedMemory { .. } => {
                refuse_slave_propagation(mount)?;
                Ok(None)
            }
            SourceKind::File => Ok(None),
            SourceKind::Kernel => {
                unsupported("is on a file system of the host's kernel: use its path below /proc or /sys")
            }
            SourceKind::HugePages => unsupported("is on a hugetlbfs: huge pages are not supported"),
            SourceKind::Character { major, minor } => match devices::find_character_device(major, minor) {
                Some(path) => Ok(Some(path.into())),
                None => Err(no_such_device()),
            },
            SourceKind::Block => Err(no_such_device()),
            SourceKind::Socket => unsupported("is a socket: a machine cannot use sockets of the host"),
            SourceKind::Fifo => unsupported("is a named pipe: a machine cannot use named pipes of the host"),
        }
    }

    /// Shares `source` and returns its path in the guest.
    fn add_share(
        &self,
        mount: &mut Mount,
        source: PathBuf,
        id_map: Option<ShareIdMap>,
        shares: &mut Vec<Share>,
    ) -> Result<PathBuf, PlanError> {
        let read_only = read_only(mount);
        let recursive = options(mount).any(|option| option == "rbind");
        // In the guest, mounts below a share inherit its options. The host makes only the top mount read-only.
        if read_only == ReadOnly::Top
            && recursive
            && self.inspect.has_mounts_below(&source).map_err(source_error(&source))?
        {
            remove_read_only(mount);
        }
        let restrictions = self.inspect.restrictions(&source).map_err(source_error(&source))?;
        keep_restrictions(mount, restrictions);
        let path = format!("{}/{}", self.id, shares.len());
        let guest_source = Path::new(SHARE_PATH).join(&path);
        shares.push(Share {
            source,
            path,
            read_only,
            recursive,
            id_map,
        });
        Ok(guest_source)
    }
}

/// Adds the options of the host's mount, which a bind mount has unless the spec says otherwise. The guest's own mount
/// does not have them.
fn keep_restrictions(mount: &mut Mount, restrictions: MountRestrictions) {
    let kept = [
        (restrictions.nosuid, "nosuid", "suid"),
        (restrictions.noexec, "noexec", "exec"),
    ];
    for (is_restricted, option, opposite) in kept {
        if is_restricted && !options(mount).any(|given| given == option || given == opposite) {
            add_option(mount, option);
        }
    }
}

/// Translates a mount other than a bind mount.
fn translate_filesystem(mount: &mut Mount) -> Result<(), PlanError> {
    let kind = match mount.typ().as_deref() {
        Some("hugetlbfs") => {
            return Err(PlanError::unsupported(
                field_name(mount),
                "huge pages are not supported",
            ));
        }
        // The guest has cgroup v2 only, which libcontainer mounts for type "cgroup".
        Some("cgroup2") => "cgroup".to_owned(),
        Some(kind) if GUEST_FILESYSTEMS.contains(&kind) => kind.to_owned(),
        Some(kind) => {
            let reason = format!(
                "a machine does not mount file systems of type {kind:?}: mount it on the host and bind-mount it"
            );
            return Err(PlanError::unsupported(field_name(mount), reason));
        }
        None => {
            let reason = "the mount has neither a type nor the option \"bind\"";
            return Err(PlanError::invalid(field_name(mount), reason));
        }
    };
    if mount.source().is_none() {
        mount.set_source(Some(kind.as_str().into()));
    }
    mount.set_typ(Some(kind));
    Ok(())
}

fn refuse_id_map(mount: &Mount, id_map: Option<&ShareIdMap>) -> Result<(), PlanError> {
    match id_map {
        None => Ok(()),
        Some(_) => Err(PlanError::unsupported(
            field_name(mount),
            "ids can be mapped only in directories and files of the host, and this one belongs to the guest",
        )),
    }
}

/// The error of an inspection of `path`.
fn source_error(path: &Path) -> impl FnOnce(io::Error) -> PlanError {
    move |source| PlanError::Source {
        path: path.to_owned(),
        source,
    }
}

/// Mounts that the host makes below a share after its start do not appear in it.
fn refuse_slave_propagation(mount: &Mount) -> Result<(), PlanError> {
    match options(mount).find(|option| matches!(*option, "slave" | "rslave")) {
        None => Ok(()),
        Some(option) => Err(PlanError::unsupported(
            field_name(mount),
            format!(
                "mounts that the host makes later do not appear in a machine: use a propagation other than {option:?} \
                 (in Kubernetes: \"HostToContainer\")"
            ),
        )),
    }
}

fn refuse_shared_propagation(mount: &Mount) -> Result<(), PlanError> {
    match options(mount).find(|option| matches!(*option, "shared" | "rshared")) {
        None => Ok(()),
        Some(option) => Err(PlanError::unsupported(
            field_name(mount),
            format!(
                "mounts made in a machine do not reach its host: use a propagation other than {option:?} (in \
                 Kubernetes: \"Bidirectional\")"
            ),
        )),
    }
}
