//! Plans a container, the sandbox of a pod, or a virtual machine from an OCI bundle.
//!
//! Belongs here: the pure translation of a spec into a [`BundlePlan`], one file for each part of the spec. Does not
//! belong here: the types of a plan (`plan`), and any I/O other than reading `config.json` and inspecting the sources
//! of bind mounts. Called by the shim through [`BundleSpec`].

mod devices;
mod guest_process;
mod hooks;
mod mounts;
mod namespaces;
mod placement;
mod rootfs;
mod settings;
#[cfg(test)]
mod tests;
mod virtual_machine;

pub(crate) use self::{guest_process::GuestProcess, rootfs::MAX_ROOT_FILES};

use std::path::{Path, PathBuf};

use nutshell_protocol::CONTAINERS_PATH;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};

use self::{
    hooks::take_host_hooks,
    mounts::{MountTranslator, pod_shm_size},
    namespaces::Namespaces,
    placement::{cgroup_path, parse_placement},
    settings::{non_empty, refuse_unsupported, strip_linux, strip_process},
};
use super::{
    BundlePlan, ContainerId, GuestSpec, HostMount, HostNamespaces, IdMap, Inspect, Limits, PidNamespace, Placement,
    Plan, PlanError, PodPlan, PodShared, PodSize, Root, Sizing, VmImage, VmPlan, VmPolicy, spec,
};

/// The OCI spec of a bundle, not checked.
#[derive(Debug)]
pub(crate) struct BundleSpec {
    bundle: PathBuf,
    spec: Spec,
}

impl BundleSpec {
    /// Reads `config.json` in `bundle`.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is no OCI spec.
    pub(crate) fn read(bundle: &Path) -> Result<Self, PlanError> {
        Ok(Self {
            bundle: bundle.to_owned(),
            spec: spec::read(bundle)?,
        })
    }

    /// Like [`Self::read`], with the bytes of `config.json`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn parse(bundle: &Path, bytes: &[u8]) -> Result<Self, PlanError> {
        Ok(Self {
            bundle: bundle.to_owned(),
            spec: spec::parse(bundle.join("config.json"), bytes)?,
        })
    }

    /// The files of the image, if the command requests a virtual machine. `rootfs` are the mounts of its snapshot. If
    /// the image has no disk, the command is a program of a container, unless [`Self::has_boot_annotation`].
    ///
    /// # Errors
    ///
    /// The files are on a block device, which only a guest may mount.
    pub(crate) fn virtual_machine_image(&self, rootfs: &[HostMount]) -> Result<Option<VmImage>, PlanError> {
        virtual_machine::find_image(&self.spec, &self.bundle, rootfs)
    }

    /// Whether an annotation selects what a virtual machine boots, so that its image needs no disk.
    ///
    /// # Errors
    ///
    /// An annotation of a virtual machine is unknown or invalid.
    pub(crate) fn has_boot_annotation(&self) -> Result<bool, PlanError> {
        virtual_machine::has_boot_annotation(&self.spec)
    }

    /// Plans the container or sandbox `id` with the mounts of its snapshot (`rootfs`). Inspects the host only through
    /// `inspect`.
    ///
    /// # Errors
    ///
    /// [`PlanError`] with the name of the field, if the spec is malformed or requests something that a machine cannot
    /// do.
    pub(crate) fn plan(
        self,
        id: &ContainerId,
        rootfs: &[HostMount],
        sizing: &Sizing,
        host: HostNamespaces,
        inspect: &dyn Inspect,
    ) -> Result<BundlePlan, PlanError> {
        plan_bundle(self, id, rootfs, sizing, host, inspect)
    }

    /// Plans a virtual machine. Inspects the host only through `inspect`.
    ///
    /// # Errors
    ///
    /// The errors of [`Self::plan`].
    pub(crate) fn plan_virtual_machine(
        self,
        policy: VmPolicy,
        sizing: &Sizing,
        inspect: &dyn Inspect,
    ) -> Result<VmPlan, PlanError> {
        virtual_machine::plan(self.spec, self.bundle, policy, sizing, inspect)
    }
}

fn plan_bundle(
    bundle: BundleSpec,
    id: &ContainerId,
    rootfs: &[HostMount],
    sizing: &Sizing,
    host: HostNamespaces,
    inspect: &dyn Inspect,
) -> Result<BundlePlan, PlanError> {
    let BundleSpec { bundle, mut spec } = bundle;
    let bundle = bundle.as_path();
    let annotations = spec.annotations().clone().unwrap_or_default();
    let placement = parse_placement(&annotations)?;
    let mut linux = spec.linux_mut().take().ok_or(PlanError::Missing("linux"))?;
    let Some(placement) = placement else {
        let size = sizing.size_for_pod(&annotations, Limits::from_annotations(&annotations)?)?;
        let pod = plan_sandbox(&mut spec, &linux, size, host, inspect)?;
        return Ok(BundlePlan::Sandbox(Box::new(pod)));
    };
    refuse_unsupported(&linux)?;
    let id_map = parse_id_map(&linux)?;
    let Namespaces { guest, network, pid } =
        namespaces::translate(linux.namespaces().as_deref().unwrap_or_default(), &placement, host)?;
    if id_map.is_some() && pid != PidNamespace::Specified {
        return Err(PlanError::unsupported(
            "linux.namespaces: user and pid",
            "a container with its own user namespace cannot share the pid namespace of other containers: set \
             shareProcessNamespace to false, or hostUsers to true",
        ));
    }
    let cgroup = cgroup_path(&linux)?;
    let process = spec.process().as_ref();
    let oom_score_adj = process.and_then(oci_spec::runtime::Process::oom_score_adj).unwrap_or(0);
    let limits = Limits::from_resources(linux.resources().as_ref());
    let size = sizing.size_for_container(&annotations, limits)?;
    let hooks = take_host_hooks(&mut spec)?;
    let root = plan_root(&mut spec, bundle, id, rootfs)?;
    let in_pod = placement != Placement::Single;
    let translator = MountTranslator {
        bundle,
        id,
        in_pod,
        host,
        id_map: id_map.as_ref(),
        inspect,
    };
    let mounts = translator.translate(spec.mounts_mut().take().unwrap_or_default())?;
    spec.set_mounts(Some(mounts.guest));
    let mut warnings = Vec::new();
    let process = spec.process_mut().as_mut().ok_or(PlanError::Missing("process"))?;
    let terminal = process.terminal().unwrap_or(false);
    let console_size = console_size(process);
    strip_process(process, &mut warnings);
    strip_linux(&mut linux, id, &mut warnings)?;
    linux.set_namespaces(Some(guest));
    spec.set_linux(Some(linux))
        .set_vm(None)
        .set_windows(None)
        .set_solaris(None)
        .set_zos(None);
    if in_pod {
        // Both names are set once for the pod, from the plan of its sandbox.
        spec.set_hostname(None).set_domainname(None);
    }
    Ok(BundlePlan::Container(Box::new(Plan {
        placement,
        spec: GuestSpec::new(spec),
        root,
        shares: mounts.shares,
        network,
        size,
        limits,
        terminal,
        console_size,
        cgroup,
        pid_namespace: pid,
        oom_score_adj,
        hooks,
        warnings,
    })))
}

fn plan_sandbox(
    spec: &mut Spec,
    linux: &Linux,
    size: PodSize,
    host: HostNamespaces,
    inspect: &dyn Inspect,
) -> Result<PodPlan, PlanError> {
    let network = namespaces::sandbox_network(linux.namespaces().as_deref().unwrap_or_default(), host)?;
    let mut sysctls: Vec<_> = linux.sysctl().clone().unwrap_or_default().into_iter().collect();
    sysctls.sort();
    Ok(PodPlan {
        size,
        network,
        cgroup: cgroup_path(linux)?,
        hooks: take_host_hooks(spec)?,
        shared: PodShared {
            hostname: non_empty(spec.hostname()).map(str::to_owned),
            domainname: non_empty(spec.domainname()).map(str::to_owned),
            sysctls,
            shm_size: pod_shm_size(spec.mounts().as_deref().unwrap_or_default(), inspect),
            // containerd mounts the file into every container.
            resolv_conf: None,
        },
    })
}

/// The mapping of the container's user namespace.
fn parse_id_map(linux: &Linux) -> Result<Option<IdMap>, PlanError> {
    const FIELD: &str = "linux.uidMappings, linux.gidMappings";
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let has_namespace = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let map = IdMap::from_spec(linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref())
        .map_err(|reason| PlanError::invalid(FIELD, reason))?;
    match &map {
        None if has_namespace => Err(PlanError::invalid(FIELD, "a user namespace needs mappings")),
        Some(_) if !has_namespace => Err(PlanError::invalid(
            FIELD,
            "user namespace mappings specified, but no user namespace",
        )),
        Some(map) if map.uids.count() > 1 || map.gids.count() > 1 => Err(PlanError::unsupported(
            FIELD,
            "a user namespace in the guest can have only one range of users and one range of groups",
        )),
        Some(map) if !map.uids.covers(0) || !map.gids.covers(0) => Err(PlanError::invalid(
            FIELD,
            "id 0 of the container is not mapped: the user namespace would have no root",
        )),
        _ => Ok(map),
    }
}

/// Plans the root file system, and writes its path in the guest into the spec.
fn plan_root(spec: &mut Spec, bundle: &Path, id: &ContainerId, mounts: &[HostMount]) -> Result<Root, PlanError> {
    let root = spec.root_mut().as_mut().ok_or(PlanError::Missing("root"))?;
    // OCI spec, "Root": a relative path is relative to the bundle.
    let directory = bundle.join(root.path());
    root.set_path(Path::new(CONTAINERS_PATH).join(id.as_str()).join("rootfs"));
    rootfs::plan_root(mounts, directory)
}

/// Columns and rows of the terminal.
fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    Some((size.width().try_into().ok()?, size.height().try_into().ok()?)).filter(|size| *size != (0, 0))
}
