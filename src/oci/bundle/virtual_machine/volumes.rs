//! The mounts and devices of a spec as disks, seed and shared directories of a virtual machine.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount};

use super::annotations::{Annotations, KERNEL_MOUNT};
use crate::oci::{
    DiskContent, DiskName, DiskSource, Inspect, PlanError, ReadOnly, Share, SourceKind, VmDisk, VmSeed,
    bundle::{
        devices,
        mounts::{field_name, is_bind, options, read_only},
    },
};

/// The mount of a disk has its destination in this directory.
const DISKS: &str = "/disks";

/// The destination of the mount with the configuration for cloud-init or Ignition.
const SEED_MOUNT: &str = "/cloud-init";

/// Bind mounts that containerd and the kubelet add to every container. They are ignored, because
/// they configure a container's root file system, and the guest boots its own.
const IGNORED_MOUNTS: [&str; 6] = [
    "/dev/shm",
    "/dev/termination-log",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// The volumes of a virtual machine.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    /// The source of the mount at [`KERNEL_MOUNT`].
    pub(super) kernel_directory: Option<PathBuf>,
    pub(super) disks: Vec<VmDisk>,
    pub(super) seed: Option<VmSeed>,
    pub(super) shares: Vec<Share>,
}

impl Volumes {
    pub(super) fn plan(
        mounts: &[Mount],
        linux: &Linux,
        annotations: &Annotations,
        max_disks: usize,
        inspect: &dyn Inspect,
    ) -> Result<Self, PlanError> {
        let mut volumes = Self::default();
        for mount in mounts.iter().filter(|mount| is_bind(mount)) {
            volumes.add_mount(mount, annotations, inspect)?;
        }
        for device in linux.devices().iter().flatten() {
            volumes.add_device(device, linux, annotations)?;
        }
        annotations.check_disks(volumes.disks.iter().map(|disk| disk.name.as_str()))?;
        if volumes.disks.len() > max_disks {
            return Err(PlanError::unsupported(
                DISKS,
                format!(
                    "{} disks are more than the maximum of {max_disks} (`max_disks` in section [vm] of the \
                     configuration)",
                    volumes.disks.len()
                ),
            ));
        }
        let mut boot_disks = volumes.disks.iter().filter(|disk| disk.is_boot_disk);
        if let (Some(one), Some(other)) = (boot_disks.next(), boot_disks.next()) {
            return Err(PlanError::invalid(
                DISKS,
                format!("both {} and {} are boot disks", one.name.as_str(), other.name.as_str()),
            ));
        }
        if volumes.seed.is_none() && annotations.data_source.is_some() {
            return Err(PlanError::invalid(
                "annotation io.containerd.nutshell.vm.datasource",
                format!("there is no mount at {SEED_MOUNT}"),
            ));
        }
        Ok(volumes)
    }

    fn add_mount(&mut self, mount: &Mount, annotations: &Annotations, inspect: &dyn Inspect) -> Result<(), PlanError> {
        let destination = mount.destination();
        if IGNORED_MOUNTS.iter().any(|ignored| destination == Path::new(ignored)) {
            return Ok(());
        }
        let source = mount.source().clone();
        let source = source.ok_or_else(|| PlanError::invalid(field_name(mount), "a bind mount needs a source"))?;
        if destination == Path::new(KERNEL_MOUNT) {
            self.kernel_directory = Some(source);
        } else if destination == Path::new(SEED_MOUNT) {
            self.seed = Some(VmSeed {
                directory: source,
                source: annotations.data_source.unwrap_or_default(),
            });
        } else if let Ok(name) = destination.strip_prefix(DISKS) {
            let name: DiskName = name
                .to_string_lossy()
                .parse()
                .map_err(|reason: String| PlanError::invalid(field_name(mount), reason))?;
            let annotation = annotations.disk(&name);
            self.disks.push(VmDisk {
                name,
                source: DiskSource::Volume {
                    path: source,
                    content: annotation.content,
                    is_read_only: read_only(mount) != ReadOnly::None,
                },
                read_only: annotation.read_only,
                is_boot_disk: annotation.boot,
            });
        } else {
            self.shares.push(plan_share(mount, source, inspect)?);
        }
        Ok(())
    }

    /// Adds a block device of the pod (`volumeDevices`). Its name is the last part of its path.
    fn add_device(&mut self, device: &LinuxDevice, linux: &Linux, annotations: &Annotations) -> Result<(), PlanError> {
        let field = || format!("linux.devices: {}", device.path().display());
        let access = allowed_access(linux, device);
        // The spec of a privileged container lists all devices of the host. Only those of the pod have separate rules.
        if access.is_none() && devices::is_privileged(linux) {
            return Ok(());
        }
        if device.typ() != LinuxDeviceType::B {
            return if devices::is_known(device) {
                Ok(())
            } else {
                Err(devices::no_such_device(&field()))
            };
        }
        let name = device.path().file_name().unwrap_or_default().to_string_lossy();
        let name: DiskName = name
            .parse()
            .map_err(|reason: String| PlanError::invalid(field(), reason))?;
        let number =
            |number: i64| u32::try_from(number).map_err(|_| PlanError::invalid(field(), "invalid device number"));
        let (major, minor) = (number(device.major())?, number(device.minor())?);
        let access = access.unwrap_or_default();
        if !access.contains('r') {
            return Err(PlanError::invalid(
                field(),
                "linux.resources.devices does not allow access to it",
            ));
        }
        let annotation = annotations.disk(&name);
        if annotation.content != DiskContent::Detected {
            return Err(PlanError::invalid(
                field(),
                format!(
                    "a block device is always a raw disk: the annotation for {} can contain only `boot` and `ro`",
                    name.as_str()
                ),
            ));
        }
        self.disks.push(VmDisk {
            name,
            source: DiskSource::BlockDevice { major, minor },
            read_only: annotation.read_only || !access.contains('w'),
            is_boot_disk: annotation.boot,
        });
        Ok(())
    }
}

/// The access that the last rule for exactly this block device allows (OCI spec, "Allowed Device list"): some of `r`,
/// `w`, `m`. A rule for many devices does not count: it must not let the guest write every disk of the host.
/// `None` without such a rule.
fn allowed_access(linux: &Linux, device: &LinuxDevice) -> Option<String> {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_ref());
    let is_for_device = |rule: &&LinuxDeviceCgroup| {
        rule.typ() == Some(LinuxDeviceType::B)
            && rule.major() == Some(device.major())
            && rule.minor() == Some(device.minor())
    };
    let rule = rules.into_iter().flatten().rfind(is_for_device)?;
    Some(match rule.allow() {
        true => rule.access().clone().unwrap_or_else(|| "rwm".to_owned()),
        false => String::new(),
    })
}

/// A directory or file that the guest can mount. Its path in the shared tree is that of the mount.
fn plan_share(mount: &Mount, source: PathBuf, inspect: &dyn Inspect) -> Result<Share, PlanError> {
    let kind = inspect.kind(&source).map_err(|error| PlanError::Source {
        path: source.clone(),
        source: error,
    })?;
    if !matches!(
        kind,
        SourceKind::Directory | SourceKind::File | SourceKind::SharedMemory { .. }
    ) {
        return Err(PlanError::unsupported(
            field_name(mount),
            format!("{} is neither a directory nor a regular file", source.display()),
        ));
    }
    if options(mount).any(|option| matches!(option, "idmap" | "ridmap")) || mount.uid_mappings().is_some() {
        return Err(PlanError::unsupported(
            field_name(mount),
            "a directory that is shared with a virtual machine cannot have an id mapping",
        ));
    }
    let path = mount.destination().to_string_lossy();
    Ok(Share {
        source,
        path: path.trim_matches('/').to_owned(),
        read_only: match read_only(mount) {
            ReadOnly::None => ReadOnly::None,
            // The guest has one mount of all shares, so the host must make them read-only.
            ReadOnly::Top | ReadOnly::All => ReadOnly::All,
        },
        recursive: options(mount).any(|option| option == "rbind"),
        id_map: None,
    })
}
