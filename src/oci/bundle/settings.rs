//! Settings of a spec that depend on the host. A setting that a container must not run without is refused. Any other is
//! not applied, with a warning.

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, Process};

use super::devices;
use crate::oci::{ContainerId, PlanError};

/// The text unless it is empty, which containerd's clients write for "not set".
pub(super) fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

/// Refuses settings that a machine cannot have and a container must not run without.
pub(super) fn refuse_unsupported(linux: &Linux) -> Result<(), PlanError> {
    let has_time_namespace = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Time);
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()) && !has_time_namespace {
        return Err(PlanError::invalid(
            "linux.timeOffsets",
            "time offsets need a new time namespace",
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
        let reason = "a listener on the host cannot receive the system calls of a machine";
        return Err(PlanError::unsupported("linux.seccomp.listenerPath", reason));
    }
    Ok(())
}

pub(super) fn strip_process(process: &mut Process, warnings: &mut Vec<String>) {
    if let Some(profile) = non_empty(process.apparmor_profile()) {
        warnings.push(format!(
            "process.apparmorProfile {profile:?} is not applied: the guest has no AppArmor"
        ));
    }
    if let Some(label) = non_empty(process.selinux_label()) {
        warnings.push(format!(
            "process.selinuxLabel {label:?} is not applied: the guest has no SELinux"
        ));
    }
    if process.exec_cpu_affinity().is_some() {
        warnings.push("process.execCPUAffinity is not applied: it refers to CPUs of the host".to_owned());
    }
    process
        .set_apparmor_profile(None)
        .set_selinux_label(None)
        .set_exec_cpu_affinity(None);
}

pub(super) fn strip_linux(linux: &mut Linux, id: &ContainerId, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    if let Some(label) = non_empty(linux.mount_label()) {
        warnings.push(format!(
            "linux.mountLabel {label:?} is not applied: the guest has no SELinux"
        ));
    }
    if linux.intel_rdt().is_some() {
        warnings.push("linux.intelRdt is not applied: a machine has no resctrl".to_owned());
    }
    if linux.memory_policy().is_some() {
        warnings.push("linux.memoryPolicy is not applied: it refers to NUMA nodes of the host".to_owned());
    }
    normalize_propagation(linux)?;
    devices::filter(linux, warnings)?;
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

/// Replaces the recursive forms of the root's propagation, which some clients write. There are no mounts below the root
/// yet, so they mean the same (OCI spec, "Rootfs Mount Propagation").
fn normalize_propagation(linux: &mut Linux) -> Result<(), PlanError> {
    const MODES: [&str; 4] = ["shared", "slave", "private", "unbindable"];
    let Some(requested) = non_empty(linux.rootfs_propagation()) else {
        linux.set_rootfs_propagation(None);
        return Ok(());
    };
    let mode = MODES
        .into_iter()
        .find(|mode| requested == *mode || requested.strip_prefix('r') == Some(mode));
    match mode {
        Some(mode) => {
            linux.set_rootfs_propagation(Some(mode.to_owned()));
            Ok(())
        }
        None => Err(PlanError::invalid(
            "linux.rootfsPropagation",
            format!("{requested:?} is none of {}", MODES.join(", ")),
        )),
    }
}

/// Keeps the resources that have the same meaning in a guest's cgroup: memory, CPU time, number of processes, and the
/// device rules, whose numbers are those of [`devices`].
fn strip_resources(resources: &mut LinuxResources, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    let huge = resources.hugepage_limits_mut().take().unwrap_or_default();
    if let Some(limit) = huge.iter().find(|limit| limit.limit() > 0) {
        let field = format!("linux.resources.hugepageLimits: {}", limit.page_size());
        return Err(PlanError::unsupported(field, "huge pages are not supported"));
    }
    if let Some(memory) = resources.memory_mut() {
        // containerd's clients write zero for "not set"; libcontainer treats it as unlimited.
        let limit = memory.limit().filter(|limit| *limit != 0);
        let swap = memory.swap().filter(|swap| *swap != 0);
        memory.set_limit(limit).set_swap(swap);
        let only_in_cgroup_v1 = [
            ("kernel", memory.kernel().is_some_and(|limit| limit > 0)),
            ("kernelTCP", memory.kernel_tcp().is_some_and(|limit| limit > 0)),
            ("swappiness", memory.swappiness().is_some()),
            ("disableOOMKiller", memory.disable_oom_killer() == Some(true)),
        ];
        for (name, _) in only_in_cgroup_v1.iter().filter(|(_, is_set)| *is_set) {
            warnings.push(format!(
                "linux.resources.memory.{name} is not applied: cgroup v2 does not have it"
            ));
        }
    }
    if let Some(cpu) = resources.cpu_mut() {
        for (name, set) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
            if let Some(set) = non_empty(set) {
                warnings.push(format!(
                    "linux.resources.cpu.{name} {set:?} is not applied: it refers to CPUs or NUMA nodes of the host"
                ));
            }
        }
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
            warnings.push("linux.resources.cpu.realtimeRuntime is not applied: cgroup v2 does not have it".to_owned());
        }
        cpu.set_cpus(None)
            .set_mems(None)
            .set_realtime_runtime(None)
            .set_realtime_period(None);
    }
    let host_devices = [
        ("blockIO", resources.block_io_mut().take().is_some()),
        ("network", resources.network_mut().take().is_some()),
        ("rdma", resources.rdma_mut().take().is_some_and(|rdma| !rdma.is_empty())),
    ];
    for (name, _) in host_devices.iter().filter(|(_, is_set)| *is_set) {
        warnings.push(format!(
            "linux.resources.{name} is not applied: it refers to devices of the host"
        ));
    }
    if let Some(unified) = resources.unified_mut() {
        unified.retain(|file, _| {
            let is_kept = ["cpu.", "memory.", "pids."]
                .iter()
                .any(|controller| file.starts_with(controller));
            if !is_kept {
                warnings.push(format!(
                    "linux.resources.unified: {file} is not applied: the guest keeps only cpu, memory and pids"
                ));
            }
            is_kept
        });
    }
    Ok(())
}
