//! The whole spec to a [`Plan`].

use std::{collections::HashMap, path::Path, time::Duration};

use nutshell_protocol::CONTAINERS_PATH;
use oci_spec::runtime::{Hook as SpecHook, Linux, LinuxNamespaceType, LinuxResources, Process, Spec};

use super::{
    BundlePlan, ContainerId, Hook, Hooks, HostMount, HostNamespaces, IdError, IdMap, Inspect, Limits, PidNamespace,
    Placement, Plan, PlanError, PodPlan, PodShared, PodSize, Root, Sizing, devices,
    mounts::{self, MountTranslator},
    namespaces::{self, Namespaces},
    rootfs, spec,
};

/// Plans the container `id` from its bundle and the mounts of its snapshot.
///
/// Reads `config.json` in `bundle` and looks at the host through `inspect` only.
///
/// # Errors
///
/// [`PlanError`], naming the field, where the spec is malformed or asks for what a machine cannot do.
pub(crate) fn plan_bundle(
    bundle: &Path,
    id: &ContainerId,
    rootfs: &[HostMount],
    sizing: &Sizing,
    host: HostNamespaces,
    inspect: Inspect<'_>,
) -> Result<BundlePlan, PlanError> {
    let mut spec: Spec = spec::read(bundle)?;
    let annotations = spec.annotations().clone().unwrap_or_default();
    let placement = placement(&annotations)?;
    let mut linux = spec.linux_mut().take().ok_or(PlanError::Missing("linux"))?;
    let Some(placement) = placement else {
        let size = sizing.size_for_pod(&annotations, Limits::from_annotations(&annotations)?)?;
        let pod = sandbox(&mut spec, &linux, size, host, inspect)?;
        return Ok(BundlePlan::Sandbox(Box::new(pod)));
    };
    refuse(&linux)?;
    let ids = user_ids(&linux)?;
    let Namespaces { guest, network, pid } =
        namespaces::translate(linux.namespaces().as_deref().unwrap_or_default(), &placement, host)?;
    if ids.is_some() && pid != PidNamespace::Specified {
        return Err(PlanError::unsupported(
            "linux.namespaces: user and pid",
            "a container with a user namespace of its own cannot share the processes of others: set \
             shareProcessNamespace to false, or hostUsers to true",
        ));
    }
    let cgroups_path = cgroups_path(&linux);
    let limits = Limits::from_resources(linux.resources().as_ref());
    let size = sizing.size_for_container(&annotations, limits)?;
    let hooks = take_host_hooks(&mut spec)?;
    let root = root(&mut spec, bundle, id, rootfs)?;
    let in_pod = placement != Placement::Single;
    let translator = MountTranslator {
        bundle,
        id,
        in_pod,
        host,
        id_map: ids.as_ref(),
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
        // The names are the pod's, which its sandbox has set.
        spec.set_hostname(None).set_domainname(None);
    }
    Ok(BundlePlan::Container(Box::new(Plan {
        placement,
        spec: serde_json::to_vec(&spec).map_err(PlanError::Encode)?,
        root,
        shares: mounts.shares,
        network,
        size,
        limits,
        terminal,
        console_size,
        cgroups_path,
        pid_namespace: pid,
        hooks,
        warnings,
    })))
}

/// What a pod's sandbox says of the pod.
fn sandbox(
    spec: &mut Spec,
    linux: &Linux,
    size: PodSize,
    host: HostNamespaces,
    inspect: Inspect<'_>,
) -> Result<PodPlan, PlanError> {
    let network = namespaces::of_sandbox(linux.namespaces().as_deref().unwrap_or_default(), host)?;
    let mut sysctls: Vec<_> = linux.sysctl().clone().unwrap_or_default().into_iter().collect();
    sysctls.sort();
    Ok(PodPlan {
        size,
        network,
        cgroups_path: cgroups_path(linux),
        hooks: take_host_hooks(spec)?,
        shared: PodShared {
            hostname: named(spec.hostname()).map(str::to_owned),
            domainname: named(spec.domainname()).map(str::to_owned),
            sysctls,
            shm_size: mounts::pod_shm_size(spec.mounts().as_deref().unwrap_or_default(), inspect),
            // containerd has mounts for them in the spec of every container.
            resolv_conf: None,
        },
    })
}

fn cgroups_path(linux: &Linux) -> Option<String> {
    let path = linux.cgroups_path().as_ref()?;
    Some(path.to_string_lossy().into_owned())
}

/// What containerd's CRI says of its containers (`internal/cri/annotations`).
/// `None` for the sandbox.
fn placement(annotations: &HashMap<String, String>) -> Result<Option<Placement>, PlanError> {
    const TYPE: &str = "io.kubernetes.cri.container-type";
    const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
    let invalid = |name: &str, reason: String| PlanError::invalid(format!("annotation {name}"), reason);
    match annotations.get(TYPE).map(String::as_str) {
        None => Ok(Some(Placement::Single)),
        Some("sandbox") => Ok(None),
        Some("container") => {
            let sandbox = annotations
                .get(SANDBOX)
                .ok_or_else(|| invalid(SANDBOX, "missing from a pod's container".to_owned()))?;
            let sandbox: ContainerId = sandbox
                .parse()
                .map_err(|error: IdError| invalid(SANDBOX, error.to_string()))?;
            Ok(Some(Placement::Member {
                sandbox: sandbox.to_string(),
            }))
        }
        Some(other) => Err(invalid(
            TYPE,
            format!("{other:?} is neither \"sandbox\" nor \"container\""),
        )),
    }
}

/// Fields that would be wrong to leave out and cannot be done.
fn refuse(linux: &Linux) -> Result<(), PlanError> {
    let has_time = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Time);
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()) && !has_time {
        return Err(PlanError::invalid(
            "linux.timeOffsets",
            "there is no new time namespace for them",
        ));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        let reason = "network devices of the host cannot be moved into a machine";
        return Err(PlanError::unsupported("linux.netDevices", reason));
    }
    if linux
        .seccomp()
        .as_ref()
        .is_some_and(|seccomp| seccomp.listener_path().is_some())
    {
        let reason = "a listener of the host cannot watch a machine's system calls";
        return Err(PlanError::unsupported("linux.seccomp.listenerPath", reason));
    }
    Ok(())
}

/// The mapping of the container's user namespace.
fn user_ids(linux: &Linux) -> Result<Option<IdMap>, PlanError> {
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
            "a user namespace of the guest has one range of users and one of groups",
        )),
        _ => Ok(map),
    }
}

/// Where the root comes from; leaves the guest's path in the spec.
fn root(spec: &mut Spec, bundle: &Path, id: &ContainerId, mounts: &[HostMount]) -> Result<Root, PlanError> {
    let root = spec.root_mut().as_mut().ok_or(PlanError::Missing("root"))?;
    // OCI spec, "Root": a relative path is relative to the bundle.
    let directory = bundle.join(root.path());
    root.set_path(Path::new(CONTAINERS_PATH).join(id.as_str()).join("rootfs"));
    rootfs::root(mounts, directory)
}

/// An empty text is "not set" to containerd's clients.
fn named(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    Some((size.width().try_into().ok()?, size.height().try_into().ok()?)).filter(|size| *size != (0, 0))
}

/// Hooks of the host's namespaces; those of the container's stay (OCI spec, "POSIX-platform Hooks").
fn take_host_hooks(spec: &mut Spec) -> Result<Hooks, PlanError> {
    let Some(mut hooks) = spec.hooks_mut().take() else {
        return Ok(Hooks::default());
    };
    let host = Hooks {
        prestart: parse_hooks("prestart", hooks.prestart_mut().take())?,
        create_runtime: parse_hooks("createRuntime", hooks.create_runtime_mut().take())?,
        poststart: parse_hooks("poststart", hooks.poststart_mut().take())?,
        poststop: parse_hooks("poststop", hooks.poststop_mut().take())?,
    };
    spec.set_hooks(Some(hooks));
    Ok(host)
}

fn parse_hooks(name: &str, hooks: Option<Vec<SpecHook>>) -> Result<Vec<Hook>, PlanError> {
    let parse = |hook: SpecHook| {
        let invalid = |reason: &str| PlanError::invalid(format!("hooks.{name}: {}", hook.path().display()), reason);
        if !hook.path().is_absolute() {
            return Err(invalid("the path must be absolute"));
        }
        let timeout = match hook.timeout().map(u64::try_from) {
            None => None,
            Some(Ok(seconds @ 1..)) => Some(Duration::from_secs(seconds)),
            Some(_) => return Err(invalid("the timeout must be greater than zero")),
        };
        Ok(Hook {
            path: hook.path().clone(),
            arguments: hook.args().clone().unwrap_or_default(),
            environment: hook.env().clone().unwrap_or_default(),
            timeout,
        })
    };
    hooks.unwrap_or_default().into_iter().map(parse).collect()
}

fn strip_process(process: &mut Process, warnings: &mut Vec<String>) {
    if let Some(profile) = named(process.apparmor_profile()) {
        warnings.push(format!(
            "process.apparmorProfile {profile:?} is not applied: the guest has no AppArmor"
        ));
    }
    if let Some(label) = named(process.selinux_label()) {
        warnings.push(format!(
            "process.selinuxLabel {label:?} is not applied: the guest has no SELinux"
        ));
    }
    if process.exec_cpu_affinity().is_some() {
        warnings.push("process.execCPUAffinity is not applied: its CPUs are the host's".to_owned());
    }
    process
        .set_apparmor_profile(None)
        .set_selinux_label(None)
        .set_exec_cpu_affinity(None);
}

fn strip_linux(linux: &mut Linux, id: &ContainerId, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    if let Some(label) = named(linux.mount_label()) {
        warnings.push(format!(
            "linux.mountLabel {label:?} is not applied: the guest has no SELinux"
        ));
    }
    if linux.intel_rdt().is_some() {
        warnings.push("linux.intelRdt is not applied to a machine".to_owned());
    }
    if linux.memory_policy().is_some() {
        warnings.push("linux.memoryPolicy is not applied: its nodes are the host's".to_owned());
    }
    set_propagation(linux)?;
    devices::translate(linux, warnings)?;
    if let Some(resources) = linux.resources_mut() {
        strip_resources(resources, warnings)?;
    }
    linux
        .set_mount_label(None)
        .set_intel_rdt(None)
        .set_memory_policy(None)
        .set_cgroups_path(Some(format!("/{id}").into()));
    Ok(())
}

/// Clients also write the recursive forms, which mean the same here: there is nothing below the root
/// yet (OCI spec, "Rootfs Mount Propagation").
fn set_propagation(linux: &mut Linux) -> Result<(), PlanError> {
    let Some(asked) = named(linux.rootfs_propagation()) else {
        linux.set_rootfs_propagation(None);
        return Ok(());
    };
    let plain = ["shared", "slave", "private", "unbindable"]
        .into_iter()
        .find(|plain| asked == *plain || asked.strip_prefix('r') == Some(plain));
    match plain {
        Some(plain) => {
            linux.set_rootfs_propagation(Some(plain.to_owned()));
            Ok(())
        }
        None => Err(PlanError::invalid(
            "linux.rootfsPropagation",
            format!("{asked:?} is no propagation"),
        )),
    }
}

/// Leaves what means the same in a guest's cgroup: memory, CPU time, number of processes, and the
/// device rules, whose numbers are those of [`devices`].
fn strip_resources(resources: &mut LinuxResources, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    let huge = resources.hugepage_limits_mut().take().unwrap_or_default();
    if let Some(limit) = huge.iter().find(|limit| limit.limit() > 0) {
        let field = format!("linux.resources.hugepageLimits: {}", limit.page_size());
        return Err(PlanError::unsupported(field, "huge pages are not supported"));
    }
    if let Some(memory) = resources.memory_mut() {
        // Zero is "not set" to containerd's clients, and no limit to libcontainer.
        let limit = memory.limit().filter(|limit| *limit != 0);
        let swap = memory.swap().filter(|swap| *swap != 0);
        memory.set_limit(limit).set_swap(swap);
        let of_version_1 = [
            ("kernel", memory.kernel().is_some_and(|limit| limit > 0)),
            ("kernelTCP", memory.kernel_tcp().is_some_and(|limit| limit > 0)),
            ("swappiness", memory.swappiness().is_some()),
            ("disableOOMKiller", memory.disable_oom_killer() == Some(true)),
        ];
        for (name, _) in of_version_1.iter().filter(|(_, set)| *set) {
            warnings.push(format!(
                "linux.resources.memory.{name} is not applied: cgroup v2 has none"
            ));
        }
    }
    if let Some(cpu) = resources.cpu_mut() {
        for (name, cpus) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
            if let Some(cpus) = named(cpus) {
                warnings.push(format!(
                    "linux.resources.cpu.{name} {cpus:?} is not applied: it numbers the host's"
                ));
            }
        }
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
            warnings.push("linux.resources.cpu.realtimeRuntime is not applied: cgroup v2 has none".to_owned());
        }
        cpu.set_cpus(None)
            .set_mems(None)
            .set_realtime_runtime(None)
            .set_realtime_period(None);
    }
    let rest = [
        ("blockIO", resources.block_io_mut().take().is_some()),
        ("network", resources.network_mut().take().is_some()),
        ("rdma", resources.rdma_mut().take().is_some_and(|rdma| !rdma.is_empty())),
    ];
    for (name, _) in rest.iter().filter(|(_, set)| *set) {
        warnings.push(format!("linux.resources.{name} is not applied in a machine"));
    }
    if let Some(unified) = resources.unified_mut() {
        unified.retain(|file, _| {
            let kept = ["cpu.", "memory.", "pids."]
                .iter()
                .any(|controller| file.starts_with(controller));
            if !kept {
                warnings.push(format!("linux.resources.unified: {file} is not applied in a machine"));
            }
            kept
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "translate_tests.rs"]
mod tests;
