//! Plans a virtual machine that boots a disk in its image or in a volume, or a kernel from a mount.
//!
//! Belongs here: the meaning of the command, of the annotations ([`annotations`]), and of mounts and devices
//! ([`volumes`]) for a virtual machine. Does not belong here: inspecting the files of an image or a volume.
//! [`super::BundleSpec`] calls it.

mod annotations;
#[cfg(test)]
mod tests;
mod volumes;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, Process, Spec};

use self::{annotations::Annotations, volumes::Volumes};
use super::{
    hooks::take_host_hooks,
    namespaces,
    placement::{cgroup_path, parse_placement},
    rootfs,
};
use crate::oci::{
    FileUser, HostMount, HostNamespaces, Inspect, Limits, Placement, PlanError, Root, Sizing, VmIdentity, VmImage,
    VmPlan, VmPolicy,
};

/// The command that requests a virtual machine. A disk image needs a command, because containerd starts no image
/// without one.
const COMMAND: &str = "vm";

/// The entrypoint of images for crun-vm, which requests a virtual machine too.
const ENTRYPOINT_OF_DISK_IMAGES: &str = "no-entrypoint";

/// Annotations of containerd's CRI (`internal/cri/annotations`).
const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const POD_NAME: &str = "io.kubernetes.cri.sandbox-name";
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";

/// Returns the files of the image, if the command of `spec` requests a virtual machine.
pub(super) fn find_image(spec: &Spec, bundle: &Path, mounts: &[HostMount]) -> Result<Option<VmImage>, PlanError> {
    if !requests_virtual_machine(spec) {
        return Ok(None);
    }
    let root = spec.root().as_ref().ok_or(PlanError::Missing("root"))?;
    let directory = bundle.join(root.path());
    match rootfs::plan_root(mounts, directory)? {
        Root::Share { files, .. } => Ok(Some(VmImage(files))),
        // The guest may have written it, so the host must not mount it.
        Root::Disk(_) => Err(PlanError::unsupported(
            mounts.first().map_or_else(String::new, |mount| {
                format!("rootfs mount of type {:?} from {}", mount.kind, mount.source)
            }),
            "the disk of a virtual machine cannot be in a snapshot that is a disk of the guest. Set snapshotter = \
             \"overlayfs\" (or native) for this runtime in containerd's configuration, or pass --snapshotter to ctr",
        )),
    }
}

/// Whether an annotation of a spec selects what a virtual machine boots, so that its image needs no disk.
pub(super) fn has_boot_annotation(spec: &Spec) -> Result<bool, PlanError> {
    let annotations = spec.annotations().clone().unwrap_or_default();
    Ok(Annotations::parse(&annotations)?.has_boot_annotation())
}

fn requests_virtual_machine(spec: &Spec) -> bool {
    let arguments = spec.process().as_ref().and_then(|process| process.args().as_ref());
    match arguments.map(Vec::as_slice) {
        Some([command]) => command == COMMAND || command == ENTRYPOINT_OF_DISK_IMAGES,
        Some([command, ..]) => command == ENTRYPOINT_OF_DISK_IMAGES,
        _ => false,
    }
}

pub(super) fn plan(
    mut spec: Spec,
    bundle: PathBuf,
    policy: VmPolicy,
    sizing: &Sizing,
    inspect: &dyn Inspect,
) -> Result<VmPlan, PlanError> {
    if !policy.enabled {
        return Err(PlanError::unsupported(
            "process.args",
            "the command requests a virtual machine, and this host runs none: set `enabled = true` in section [vm] of \
             the configuration",
        ));
    }
    let annotations = spec.annotations().clone().unwrap_or_default();
    let placement = parse_placement(&annotations)?.unwrap_or(Placement::Single);
    let settings = Annotations::parse(&annotations)?;
    let linux = spec.linux_mut().take().ok_or(PlanError::Missing("linux"))?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let network = namespaces::translate(namespaces, &placement, HostNamespaces::Refuse)?.network;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let Volumes {
        kernel_directory,
        disks,
        seed,
        shares,
    } = Volumes::plan(mounts, &linux, &settings, policy.max_disks, inspect)?;
    let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
    let limits = Limits::from_resources(linux.resources().as_ref());
    let has_persistent_root = disks.iter().any(|disk| disk.is_boot_disk);
    Ok(VmPlan {
        placement,
        identity: identify(&annotations, has_persistent_root, bundle),
        kernel: settings.kernel(kernel_directory)?,
        kernel_arguments: settings.kernel_arguments,
        on_reboot: settings.on_reboot,
        exec: settings.exec,
        disks,
        seed,
        shares,
        user: find_file_user(process),
        network,
        hostname: find_hostname(&spec),
        resolv_conf: find_resolv_conf(mounts),
        limits,
        size: sizing.size_for_virtual_machine(&annotations, limits, settings.growth)?,
        cgroup: cgroup_path(&linux)?,
        oom_score_adj: process.oom_score_adj().unwrap_or(0),
        hooks: take_host_hooks(&mut spec)?,
    })
}

fn identify(annotations: &HashMap<String, String>, has_persistent_root: bool, bundle: PathBuf) -> VmIdentity {
    let find = |name: &str| annotations.get(name).filter(|value| !value.is_empty()).cloned();
    match (find(POD_UID), find(POD_NAMESPACE), find(POD_NAME), find(CONTAINER_NAME)) {
        (_, Some(namespace), Some(pod), Some(container)) if has_persistent_root => VmIdentity::Names {
            namespace,
            pod,
            container,
        },
        (Some(uid), ..) => VmIdentity::Pod(uid),
        _ => VmIdentity::Bundle(bundle),
    }
}

fn find_file_user(process: &Process) -> FileUser {
    let user = process.user();
    FileUser {
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
    }
}

/// The host name of a spec. The specs of a pod's containers have it in their environment only (containerd
/// `internal/cri/server`).
fn find_hostname(spec: &Spec) -> Option<String> {
    let environment = spec.process().as_ref().and_then(|process| process.env().as_deref());
    let from_environment = || environment?.iter().find_map(|entry| entry.strip_prefix("HOSTNAME="));
    let name = spec.hostname().as_deref().filter(|name| !name.is_empty());
    name.or_else(from_environment).map(str::to_owned)
}

/// The source of the mount at `/etc/resolv.conf`.
fn find_resolv_conf(mounts: &[Mount]) -> Option<PathBuf> {
    let mount = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new("/etc/resolv.conf"));
    mount?.source().clone()
}
