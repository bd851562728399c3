//! Prepares an OCI spec for libcontainer: removes settings without a meaning in the guest, and extracts those that the
//! agent applies itself.

use std::collections::HashMap;

use nutshell_protocol::Failure;
use oci_spec::runtime::{
    Capabilities, Hook, Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxIdMapping, LinuxNamespace,
    LinuxNamespaceType, Mount, Process, Spec,
};

use super::program::Program;
use crate::cgroup::Cgroup;
use crate::cgroup::limits::clean_resources;
use crate::failure::FailureExt;
use crate::machine::settings;

/// A spec for libcontainer, and the settings that the agent applies itself.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The spec for libcontainer.
    pub(super) spec: Spec,
    /// The program of the first process.
    pub(super) program: Program,
    /// The program's user id in the guest's initial user namespace.
    pub(super) outer_uid: u32,
    /// The device rules.
    pub(super) devices: Vec<LinuxDeviceCgroup>,
    /// The hooks that run in the guest.
    pub(super) hooks: GuestHooks,
    /// Settings of namespaces that the container shares with the machine, and so with its pod.
    pub(super) machine_settings: MachineSettings,
}

/// Hooks that run in the container's namespaces (OCI config.md, "POSIX-platform Hooks").
#[derive(Debug, Default)]
pub(super) struct GuestHooks {
    /// Run after the container's mounts are made, before pivot_root(2).
    pub(super) create_container: Vec<Hook>,
    /// Run by the first process before it executes the program.
    pub(super) start_container: Vec<Hook>,
}

/// Settings of the machine's own namespaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MachineSettings {
    /// The host name.
    pub(super) hostname: Option<String>,
    /// Kernel parameters: the name, in the form of sysctl(8), and the value.
    pub(super) sysctls: Vec<(String, String)>,
}

pub(super) fn parse(json: &[u8]) -> Result<Spec, Failure> {
    serde_json::from_slice(json).map_err(|error| Failure::invalid(format!("cannot parse the OCI spec: {error}")))
}

/// Prepares a spec for libcontainer. `terminal` overrides the spec's `process.terminal`.
pub(super) fn prepare(mut spec: Spec, cgroup: &Cgroup, terminal: bool) -> Result<Prepared, Failure> {
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| Failure::invalid("the OCI spec has no process"))?;
    let program = Program::of(&process)?;
    clean_process(&mut process, terminal);
    let capabilities = complete_capabilities(process.capabilities().clone());
    process.set_capabilities(Some(capabilities));
    // Without HOME, libcontainer would look up the user with the C library, which may load code from the container's
    // file system. The executor sets the real environment.
    process.set_env(Some(vec!["HOME=/".to_owned()]));
    spec.set_process(Some(process));

    let Some(mut linux) = spec.linux().clone() else {
        return Err(Failure::invalid("the OCI spec has no linux section"));
    };
    linux.set_cgroups_path(Some(cgroup.spec_path()));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    let devices = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default();
    if let Some(resources) = linux.resources().clone() {
        linux.set_resources(Some(clean_resources(resources)));
    }
    let namespaces: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
    // In the agent's pid namespace, a container could control the agent, and create sockets of AF_VSOCK
    // (guest/kernel/patches/required/vsock-containers.patch).
    for (kind, name) in [(LinuxNamespaceType::Mount, "mount"), (LinuxNamespaceType::Pid, "pid")] {
        if !namespaces.contains(&kind) {
            return Err(Failure::invalid(format!("the OCI spec has no {name} namespace")));
        }
    }
    let mut machine_settings = MachineSettings::default();
    if !namespaces.contains(&LinuxNamespaceType::Uts) {
        machine_settings.hostname = spec.hostname().clone();
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    if let Some(sysctls) = linux.sysctl().clone() {
        let (shared, own) = sysctls
            .into_iter()
            .partition(|(name, _)| namespace_of_sysctl(name).is_some_and(|namespace| !namespaces.contains(&namespace)));
        machine_settings.sysctls = Vec::from_iter::<HashMap<_, _>>(shared);
        linux.set_sysctl(Some(own));
    }
    let hooks = take_hooks(&mut spec, &program);
    if namespaces.contains(&LinuxNamespaceType::User) {
        for mount in spec.mounts_mut().iter_mut().flatten() {
            bind_if_not_owned(mount, &namespaces);
        }
    }
    let outer_uid = outer_uid(&linux, program.uid);
    spec.set_linux(Some(linux));
    Ok(Prepared {
        spec,
        program,
        outer_uid,
        devices,
        hooks,
        machine_settings,
    })
}

/// If a mount is of a file system that shows one of the machine's namespaces, replaces it with a bind mount of the
/// machine's mount. In a user namespace, such a file system can be mounted only if the user namespace owns the
/// namespace that the file system shows.
fn bind_if_not_owned(mount: &mut Mount, namespaces: &[LinuxNamespaceType]) {
    let (namespace, source) = match mount.typ().as_deref() {
        Some("sysfs") => (LinuxNamespaceType::Network, "/sys"),
        Some("mqueue") => (LinuxNamespaceType::Ipc, "/dev/mqueue"),
        _ => return,
    };
    if namespaces.contains(&namespace) {
        return;
    }
    // A user namespace may not bind a mount without the mounts below it either, hence rbind and rro.
    let mut options = vec!["rbind".to_owned()];
    for option in mount.options().iter().flatten() {
        match option.as_str() {
            "ro" => options.extend(["ro".to_owned(), "rro".to_owned()]),
            "nosuid" | "nodev" | "noexec" => options.push(option.clone()),
            _ => {}
        }
    }
    mount
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options));
}

/// Removes all hooks from the spec and returns those that run in the guest. The shim runs the others on the host. As
/// with runc, a `startContainer` hook without an environment gets the program's.
fn take_hooks(spec: &mut Spec, program: &Program) -> GuestHooks {
    let Some(mut hooks) = spec.hooks_mut().take() else {
        return GuestHooks::default();
    };
    let mut start_container = hooks.start_container_mut().take().unwrap_or_default();
    for hook in &mut start_container {
        if hook.env().is_none() {
            hook.set_env(Some(program.env.clone()));
        }
    }
    GuestHooks {
        create_container: hooks.create_container_mut().take().unwrap_or_default(),
        start_container,
    }
}

/// Returns the namespace of a kernel parameter, if it is one that a pod's containers may share.
fn namespace_of_sysctl(name: &str) -> Option<LinuxNamespaceType> {
    let ipc = ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."];
    if name.starts_with("net.") {
        Some(LinuxNamespaceType::Network)
    } else if ipc.iter().any(|prefix| name.starts_with(prefix)) {
        Some(LinuxNamespaceType::Ipc)
    } else {
        None
    }
}

impl MachineSettings {
    /// Applies the settings to the namespaces of the calling process.
    pub(super) fn apply(&self) -> Result<(), Failure> {
        if let Some(hostname) = &self.hostname {
            settings::set_hostname(hostname)?;
        }
        for (name, value) in &self.sysctls {
            settings::set_sysctl(name, value)?;
        }
        Ok(())
    }
}

/// Drops the settings of a process that this machine does not support. `terminal` overrides the spec's
/// `process.terminal`.
pub(super) fn clean_process(process: &mut Process, terminal: bool) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process.set_terminal(Some(terminal));
    // `false` means the same as no value. With `false`, however, libcontainer would load the seccomp filter at a point
    // where it lacks the privilege.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
}

/// Completes the capability sets: as with runc, a missing one is empty. libcontainer leaves it unchanged, and the agent
/// has all capabilities.
pub(super) fn complete_capabilities(capabilities: Option<LinuxCapabilities>) -> LinuxCapabilities {
    let none = || Some(Capabilities::new());
    let mut complete = LinuxCapabilities::default();
    let given = capabilities.as_ref();
    complete
        .set_bounding(given.map_or_else(none, |given| given.bounding().clone().or_else(none)))
        .set_effective(given.map_or_else(none, |given| given.effective().clone().or_else(none)))
        .set_permitted(given.map_or_else(none, |given| given.permitted().clone().or_else(none)))
        .set_inheritable(given.map_or_else(none, |given| given.inheritable().clone().or_else(none)))
        .set_ambient(given.map_or_else(none, |given| given.ambient().clone().or_else(none)));
    complete
}

/// Maps a user id of the container to the guest's initial user namespace.
pub(super) fn outer_uid(linux: &Linux, uid: u32) -> u32 {
    outer_id(linux.uid_mappings().as_deref(), uid)
}

/// Maps an id of the container to the guest's initial user namespace.
pub(super) fn outer_id(mappings: Option<&[LinuxIdMapping]>, id: u32) -> u32 {
    let mapped = mappings.unwrap_or_default().iter().find_map(|map| {
        let offset = id
            .checked_sub(map.container_id())
            .filter(|offset| *offset < map.size())?;
        map.host_id().checked_add(offset)
    });
    mapped.unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn spec(json: serde_json::Value) -> Spec {
        parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn labels_and_host_limits_are_dropped() {
        let spec = spec(serde_json::json!({
            "ociVersion": "1.2.0",
            "hostname": "h",
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 5, "gid": 0}, "env": ["A=b"],
                "apparmorProfile": "p", "selinuxLabel": "l", "noNewPrivileges": false},
            "linux": {"mountLabel": "m", "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}],
                "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "5"}, "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                "resources": {"cpu": {"shares": 2, "cpus": "7", "mems": "1"},
                    "hugepageLimits": [{"pageSize": "3GB", "limit": 0}],
                    "devices": [{"allow": false, "access": "rwm"}]}}
        }));
        let prepared = prepare(spec, &Cgroup::of_container("id"), true).unwrap();
        let process = prepared.spec.process().as_ref().unwrap();
        assert_eq!(process.apparmor_profile(), &None);
        assert_eq!(process.selinux_label(), &None);
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.terminal(), Some(true));
        let linux = prepared.spec.linux().as_ref().unwrap();
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(linux.mount_label(), &None);
        assert_eq!(resources.devices(), &None);
        assert_eq!(resources.cpu().as_ref().unwrap().cpus(), &None);
        assert_eq!(resources.cpu().as_ref().unwrap().shares(), Some(2));
        assert_eq!(resources.hugepage_limits(), &Some(vec![]));
        assert_eq!(prepared.spec.hostname(), &None, "the container has no UTS namespace");
        let machine_settings = MachineSettings {
            hostname: Some("h".to_owned()),
            sysctls: vec![("net.ipv4.ip_forward".to_owned(), "1".to_owned())],
        };
        assert_eq!(prepared.machine_settings, machine_settings);
        assert_eq!(
            linux.sysctl().as_ref().unwrap().len(),
            1,
            "the container has an IPC namespace"
        );
        assert_eq!(prepared.devices.len(), 1);
        assert_eq!(prepared.program.env, ["A=b"]);
        assert_eq!(prepared.outer_uid, 1005);
    }

    #[test]
    fn user_namespace_binds_file_systems_that_show_the_machines_namespaces() {
        let map = serde_json::json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        let mount = |kind: &str| serde_json::json!({"destination": format!("/{kind}"), "type": kind, "source": kind, "options": ["nosuid", "ro", "x=y"]});
        let spec = spec(serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "mounts": [mount("sysfs"), mount("mqueue"), mount("proc"), mount("tmpfs")],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "user"}, {"type": "pid"}], "uidMappings": map, "gidMappings": map}
        }));
        let prepared = prepare(spec, &Cgroup::of_container("id"), false).unwrap();
        let mounts: Vec<_> = prepared.spec.mounts().iter().flatten().collect();
        let kinds: Vec<_> = mounts.iter().map(|mount| mount.typ().as_deref().unwrap()).collect();
        assert_eq!(kinds, ["bind", "bind", "proc", "tmpfs"]);
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("/sys")));
        assert_eq!(
            mounts[0].options().as_deref().unwrap(),
            ["rbind", "nosuid", "ro", "rro"]
        );
    }

    #[test]
    fn libcontainer_supports_every_announced_mount_option() {
        use libcontainer::syscall::linux::{MountOption, MountRecursive};
        use std::str::FromStr;
        for option in nutshell_protocol::MOUNT_OPTIONS {
            let known = MountOption::from_str(option).is_ok() || MountRecursive::from_str(option).is_ok();
            assert!(known, "{option}");
        }
    }

    #[test]
    fn container_without_its_own_mount_or_pid_namespace_is_invalid() {
        for (kept, missing) in [("pid", "mount"), ("mount", "pid")] {
            let spec = spec(
                serde_json::json!({"ociVersion": "1.2.0", "linux": {"namespaces": [{"type": kept}]},
                "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}}}),
            );
            let failure = prepare(spec, &Cgroup::of_container("id"), false).unwrap_err();
            assert_eq!(failure.kind, nutshell_protocol::FailureKind::InvalidArgument);
            assert_eq!(failure.message, format!("the OCI spec has no {missing} namespace"));
        }
    }

    #[test]
    fn process_without_arguments_is_invalid() {
        let spec = spec(serde_json::json!({"ociVersion": "1.2.0", "linux": {},
            "process": {"args": [], "cwd": "/", "user": {"uid": 0, "gid": 0}}}));
        assert_eq!(
            prepare(spec, &Cgroup::of_container("id"), false).unwrap_err().kind,
            nutshell_protocol::FailureKind::InvalidArgument
        );
    }
}
