//! From the spec as it came to the one that libcontainer gets: what has no meaning in this machine
//! is dropped, what libcontainer would do in its own way is taken out and done in ours.

use std::path::{Component, Path, PathBuf};

use nutshell_protocol::Failure;
use oci_spec::runtime::{LinuxHugepageLimit, LinuxNamespaceType, LinuxResources, Process, Spec};

use crate::job::FailureExt;

/// A spec that libcontainer takes, and what was taken out of it.
#[derive(Debug)]
pub(super) struct Prepared {
    /// For libcontainer.
    pub(super) spec: Spec,
    /// The container's cgroup, below the root.
    pub(super) cgroup: String,
    /// The first process.
    pub(super) program: Program,
    /// The user's id in the guest's first user namespace.
    pub(super) outer_uid: u32,
}

/// What is executed.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Arguments; the first names the executable.
    pub(super) args: Vec<String>,
    /// Environment as it came.
    pub(super) env: Vec<String>,
    /// Working folder.
    pub(super) cwd: PathBuf,
    /// User id inside of the container.
    pub(super) uid: u32,
}

impl Program {
    /// What `process` executes.
    pub(super) fn of(process: &Process) -> Result<Self, Failure> {
        let args = process.args().clone().unwrap_or_default();
        if args.is_empty() {
            return Err(Failure::invalid("process.args must not be empty"));
        }
        Ok(Self {
            args,
            env: process.env().clone().unwrap_or_default(),
            cwd: process.cwd().clone(),
            uid: process.user().uid(),
        })
    }
}

/// Reads a spec.
pub(super) fn parse(json: &[u8]) -> Result<Spec, Failure> {
    serde_json::from_slice(json).map_err(|error| Failure::invalid(format!("the OCI spec cannot be read: {error}")))
}

/// The cgroup that a spec asks for, below the root: always one of its own.
///
/// A path in systemd's form (`slice:prefix:name`) names units of the host; `/<id>` serves then.
pub(super) fn cgroup(spec: &Spec, id: &str) -> String {
    let asked = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    let plain = |path: &&Path| {
        let mut parts = path.components();
        path.to_str().is_some_and(|text| !text.contains(':'))
            && parts.all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
            && path.components().any(|part| matches!(part, Component::Normal(_)))
    };
    match asked.filter(plain) {
        Some(path) => format!("/{}", path.to_string_lossy().trim_matches('/')),
        None => format!("/{id}"),
    }
}

/// Makes a spec fit for this machine.
pub(super) fn prepare(mut spec: Spec, id: &str, terminal: bool) -> Result<Prepared, Failure> {
    let cgroup = cgroup(&spec, id);
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
    linux.set_cgroups_path(Some(PathBuf::from(&cgroup)));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    // Kept for the time after the mounts: see `devices`.
    if let Some(resources) = linux.resources().clone() {
        linux.set_resources(Some(clean_resources(resources)));
    }
    let own_uts = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    let outer_uid = outer_id(
        program.uid,
        linux
            .uid_mappings()
            .iter()
            .flatten()
            .map(|map| (map.container_id(), map.host_id(), map.size())),
    );
    spec.set_linux(Some(linux));
    if !own_uts {
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    Ok(Prepared {
        spec,
        cgroup,
        program,
        outer_uid,
    })
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

/// Drops limits on what is the host's (its CPUs by number, its devices, its page sizes) and what only
/// version 1 of cgroups knows. Device rules are applied by the agent itself.
pub(super) fn clean_resources(mut resources: LinuxResources) -> LinuxResources {
    resources.set_devices(None);
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(limits) = resources.hugepage_limits().clone() {
        let known = limits.into_iter().filter(is_known_page_size).collect();
        resources.set_hugepage_limits(Some(known));
    }
    resources
}

fn is_known_page_size(limit: &LinuxHugepageLimit) -> bool {
    let size = limit.page_size();
    let kilobytes = [("KB", 1), ("MB", 1 << 10), ("GB", 1 << 20)]
        .iter()
        .find_map(|(unit, factor)| size.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*factor));
    kilobytes.is_some_and(|size| Path::new(&format!("/sys/kernel/mm/hugepages/hugepages-{size}kB")).exists())
}

/// The id outside of a user namespace: `maps` holds (inside, outside, count).
fn outer_id(id: u32, maps: impl Iterator<Item = (u32, u32, u32)>) -> u32 {
    for (inside, outside, count) in maps {
        if let Some(offset) = id.checked_sub(inside).filter(|offset| *offset < count) {
            return outside.saturating_add(offset);
        }
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> Spec {
        parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn cgroup_is_the_one_asked_for_or_the_containers_own() {
        for (asked, expected) in [
            (Some("/default/c1"), "/default/c1"),
            (Some("kubepods/burstable/pod1/c1"), "/kubepods/burstable/pod1/c1"),
            (Some("kubepods.slice:cri-containerd:c1"), "/id"),
            (Some("/"), "/id"),
            (Some(""), "/id"),
            (Some("/a/../../b"), "/id"),
            (None, "/id"),
        ] {
            let spec = spec(serde_json::json!({"ociVersion": "1.2.0", "linux": {"cgroupsPath": asked}}));
            assert_eq!(cgroup(&spec, "id"), expected, "{asked:?}");
        }
    }

    #[test]
    fn labels_and_host_limits_are_dropped() {
        let spec = spec(serde_json::json!({
            "ociVersion": "1.2.0",
            "hostname": "h",
            "process": {"args": ["x"], "cwd": "/", "user": {"uid": 5, "gid": 0}, "env": ["A=b"],
                "apparmorProfile": "p", "selinuxLabel": "l", "noNewPrivileges": false},
            "linux": {"mountLabel": "m", "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                "resources": {"cpu": {"shares": 2, "cpus": "7", "mems": "1"},
                    "hugepageLimits": [{"pageSize": "3GB", "limit": 0}],
                    "devices": [{"allow": false, "access": "rwm"}]}}
        }));
        let prepared = prepare(spec, "id", true).unwrap();
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
        assert_eq!(prepared.program.env, ["A=b"]);
        assert_eq!(prepared.outer_uid, 1005);
    }

    #[test]
    fn process_without_arguments_is_invalid() {
        let spec = spec(serde_json::json!({"ociVersion": "1.2.0", "linux": {},
            "process": {"args": [], "cwd": "/", "user": {"uid": 0, "gid": 0}}}));
        assert_eq!(
            prepare(spec, "id", false).unwrap_err().kind,
            nutshell_protocol::FailureKind::InvalidArgument
        );
    }
}
