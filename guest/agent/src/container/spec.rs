//! From the spec as it came to the one that libcontainer gets: what has no meaning in this machine
//! is dropped, what libcontainer would do in its own way is taken out and done in ours.

use std::collections::HashMap;

use nutshell_protocol::Failure;
use oci_spec::runtime::{Hook, Linux, LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType, Mount, Process, Spec};

use super::program::Program;
use crate::cgroup::Cgroup;
use crate::cgroup::limits::clean_resources;
use crate::failure::FailureExt;
use crate::machine::settings;

/// A spec that libcontainer takes, and what was taken out of it.
#[derive(Debug)]
pub(super) struct Prepared {
    /// For libcontainer.
    pub(super) spec: Spec,
    /// The first process.
    pub(super) program: Program,
    /// The user's id in the guest's first user namespace.
    pub(super) outer_uid: u32,
    /// Which devices it may use.
    pub(super) devices: Vec<LinuxDeviceCgroup>,
    /// Hooks that run in the container's namespaces.
    pub(super) hooks: GuestHooks,
    /// What the spec sets in a namespace that it does not get for its own: the machine's, which is
    /// the pod's.
    pub(super) machine_settings: MachineSettings,
}

/// Hooks that run in the container's namespaces (OCI config.md, "POSIX-platform Hooks").
#[derive(Debug, Default)]
pub(super) struct GuestHooks {
    /// Once its mounts are made.
    pub(super) create_container: Vec<Hook>,
    /// Before its program is executed.
    pub(super) start_container: Vec<Hook>,
}

/// Settings of the machine.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MachineSettings {
    /// Its host name.
    pub(super) hostname: Option<String>,
    /// Its kernel parameters, by their names in sysctl(8)'s form.
    pub(super) sysctls: Vec<(String, String)>,
}

/// Reads a spec.
pub(super) fn parse(json: &[u8]) -> Result<Spec, Failure> {
    serde_json::from_slice(json).map_err(|error| Failure::invalid(format!("the OCI spec cannot be read: {error}")))
}

/// Makes a spec fit for this machine.
pub(super) fn prepare(mut spec: Spec, cgroup: &Cgroup, terminal: bool) -> Result<Prepared, Failure> {
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| Failure::invalid("the OCI spec has no process"))?;
    let program = Program::of(&process)?;
    clean_process(&mut process, terminal);
    // libcontainer would look HOME up by means of the C library, which may load code from the
    // container's files to do so. It finds one here; the real one is up to the executor.
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
    if !namespaces.contains(&LinuxNamespaceType::Mount) {
        return Err(Failure::invalid("the OCI spec gives the container no mount namespace"));
    }
    let mut machine_settings = MachineSettings::default();
    if !namespaces.contains(&LinuxNamespaceType::Uts) {
        machine_settings.hostname = spec.hostname().clone();
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    if let Some(sysctls) = linux.sysctl().clone() {
        let (machines, own) = sysctls
            .into_iter()
            .partition(|(name, _)| namespace_of_sysctl(name).is_some_and(|namespace| !namespaces.contains(&namespace)));
        machine_settings.sysctls = Vec::from_iter::<HashMap<_, _>>(machines);
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

/// The machine's own in place of a file system that shows a namespace of the machine: a user namespace
/// may mount only what shows namespaces that belong to it.
fn bind_if_not_owned(mount: &mut Mount, namespaces: &[LinuxNamespaceType]) {
    let (shows, machines) = match mount.typ().as_deref() {
        Some("sysfs") => (LinuxNamespaceType::Network, "/sys"),
        Some("mqueue") => (LinuxNamespaceType::Ipc, "/dev/mqueue"),
        Some("proc") => (LinuxNamespaceType::Pid, "/proc"),
        _ => return,
    };
    if namespaces.contains(&shows) {
        return;
    }
    // What the machine has mounted below cannot be left out, by the same rule.
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
        .set_source(Some(machines.into()))
        .set_options(Some(options));
}

/// The others run in the runtime's place, which is the host's. As with runc, a `startContainer` hook
/// without an environment has the program's.
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

/// The namespace that a kernel parameter belongs to, of those that a pod's containers may share.
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
    /// Applies the settings.
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

/// Drops what this machine does not know from a process.
pub(super) fn clean_process(process: &mut Process, terminal: bool) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process.set_terminal(Some(terminal));
    // An explicit "no" means the same as none, but libcontainer would load the system call filter
    // where it lacks the privilege to.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
}

/// A user's id outside of the container's user namespace.
pub(super) fn outer_uid(linux: &Linux, uid: u32) -> u32 {
    let mapped = linux.uid_mappings().iter().flatten().find_map(|map| {
        let offset = uid
            .checked_sub(map.container_id())
            .filter(|offset| *offset < map.size())?;
        map.host_id().checked_add(offset)
    });
    mapped.unwrap_or(uid)
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
            "linux": {"mountLabel": "m", "namespaces": [{"type": "mount"}, {"type": "ipc"}],
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
        assert_eq!(prepared.spec.hostname(), &None, "there is no namespace for it");
        let machine_settings = MachineSettings {
            hostname: Some("h".to_owned()),
            sysctls: vec![("net.ipv4.ip_forward".to_owned(), "1".to_owned())],
        };
        assert_eq!(prepared.machine_settings, machine_settings);
        assert_eq!(linux.sysctl().as_ref().unwrap().len(), 1, "there is an ipc namespace");
        assert_eq!(prepared.devices.len(), 1);
        assert_eq!(prepared.program.env, ["A=b"]);
        assert_eq!(prepared.outer_uid, 1005);
    }

    #[test]
    fn user_namespace_binds_what_shows_namespaces_of_the_machine() {
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
    fn every_mount_option_that_the_shim_announces_is_one_of_libcontainers() {
        use libcontainer::syscall::linux::{MountOption, MountRecursive};
        use std::str::FromStr;
        for option in nutshell_protocol::MOUNT_OPTIONS {
            let known = MountOption::from_str(option).is_ok() || MountRecursive::from_str(option).is_ok();
            assert!(known, "{option}");
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
