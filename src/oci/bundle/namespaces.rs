//! Translates the namespaces of a spec for the guest.
//!
//! Namespace paths in a spec are paths on the host. They are never opened here, and the guest never sees them. The path
//! of the network namespace goes into the plan. The paths of a pod's ipc, uts and pid namespaces, which containerd's
//! CRI makes from the sandbox's pid, denote the namespaces that the containers share in the pod's machine. So does any
//! other path of these types, because nothing else can be shared. Only a pid namespace can also be that of one task.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::oci::{HostNamespaces, Network, PidNamespace, Placement, PlanError};

#[derive(Debug)]
pub(super) struct Namespaces {
    /// The namespaces in the guest's spec.
    pub(super) guest: Vec<LinuxNamespace>,
    pub(super) network: Network,
    pub(super) pid: PidNamespace,
}

/// The network of a pod's sandbox. Its other namespaces are only checked: the pod's machine takes their place.
pub(super) fn sandbox_network(namespaces: &[LinuxNamespace], host: HostNamespaces) -> Result<Network, PlanError> {
    refuse_duplicates(namespaces)?;
    let find = |kind| namespaces.iter().find(|namespace| namespace.typ() == kind);
    if find(LinuxNamespaceType::Pid).is_none() {
        host.refuse_unless_pod("hostPID", "pid")?;
    }
    if find(LinuxNamespaceType::Ipc).is_none() {
        host.refuse_unless_pod("hostIPC", "ipc")?;
    }
    match find(LinuxNamespaceType::Network).map(path_of) {
        Some(None) => Ok(Network::Loopback),
        Some(Some(path)) => Ok(Network::Namespace(path.to_owned())),
        None => {
            host.refuse_network_unless_pod("hostNetwork (linux.namespaces: no network)")?;
            Ok(Network::Loopback)
        }
    }
}

fn refuse_duplicates(namespaces: &[LinuxNamespace]) -> Result<(), PlanError> {
    for (index, namespace) in namespaces.iter().enumerate() {
        let kind = namespace.typ();
        if namespaces[..index].iter().any(|earlier| earlier.typ() == kind) {
            return Err(PlanError::invalid(
                "linux.namespaces",
                format!("{kind} is listed twice"),
            ));
        }
    }
    Ok(())
}

fn add_if_missing(namespaces: &mut Vec<LinuxNamespace>, kind: LinuxNamespaceType) {
    if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind);
        namespaces.push(namespace);
    }
}

fn path_of(namespace: &LinuxNamespace) -> Option<&Path> {
    namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty())
}

pub(super) fn translate(
    namespaces: &[LinuxNamespace],
    placement: &Placement,
    host: HostNamespaces,
) -> Result<Namespaces, PlanError> {
    refuse_duplicates(namespaces)?;
    let mut translated = Namespaces {
        guest: Vec::new(),
        network: match host {
            HostNamespaces::Refuse | HostNamespaces::Pod => Network::Host,
            HostNamespaces::PodAndNetwork => Network::Loopback,
        },
        pid: PidNamespace::Specified,
    };
    let is_single = *placement == Placement::Single;
    for namespace in namespaces {
        match (namespace.typ(), path_of(namespace)) {
            // Every member's spec contains the mapping, so each member gets a new user namespace.
            (LinuxNamespaceType::User, Some(_)) if !is_single => {
                let mut user = LinuxNamespace::default();
                user.set_typ(LinuxNamespaceType::User);
                translated.guest.push(user);
            }
            (LinuxNamespaceType::Network, None) => translated.network = Network::Loopback,
            (LinuxNamespaceType::Network, Some(path)) => translated.network = Network::Namespace(path.to_owned()),
            (LinuxNamespaceType::Pid, Some(path)) if !is_single => {
                translated.pid = parse_task_pid(path).map_or(PidNamespace::Pod, PidNamespace::Task);
            }
            (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, _) if !is_single => {}
            (kind, Some(path)) => {
                return Err(PlanError::unsupported(
                    format!("linux.namespaces: {kind}"),
                    format!("a machine cannot join the namespace {} of the host", path.display()),
                ));
            }
            (_, None) => translated.guest.push(namespace.clone()),
        }
    }
    let is_missing = |kind| !namespaces.iter().any(|namespace| namespace.typ() == kind);
    if is_missing(LinuxNamespaceType::Ipc) {
        host.refuse_unless_pod("hostIPC", "ipc")?;
    }
    if is_missing(LinuxNamespaceType::Pid) {
        host.refuse_unless_pod("hostPID", "pid")?;
        if !is_single {
            translated.pid = PidNamespace::Pod;
        }
    }
    // Without these a container would see the agent's mounts and processes.
    if translated.pid == PidNamespace::Specified {
        add_if_missing(&mut translated.guest, LinuxNamespaceType::Pid);
    }
    add_if_missing(&mut translated.guest, LinuxNamespaceType::Mount);
    Ok(translated)
}

/// The pid in `/proc/<pid>/ns/pid`.
fn parse_task_pid(path: &Path) -> Option<u32> {
    path.to_str()?
        .strip_prefix("/proc/")?
        .strip_suffix("/ns/pid")?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(kinds: &[(&str, &str)]) -> Vec<LinuxNamespace> {
        kinds
            .iter()
            .map(|(kind, path)| serde_json::from_value(serde_json::json!({"type": kind, "path": path})).unwrap())
            .collect()
    }

    fn kept(translated: &Namespaces) -> Vec<String> {
        translated
            .guest
            .iter()
            .map(|namespace| namespace.typ().to_string())
            .collect()
    }

    fn member() -> Placement {
        Placement::Member {
            sandbox: "pod".to_owned(),
        }
    }

    const ALL: [(&str, &str); 6] = [
        ("pid", ""),
        ("ipc", ""),
        ("uts", ""),
        ("mount", ""),
        ("network", ""),
        ("cgroup", ""),
    ];

    #[test]
    fn single_container_keeps_its_new_namespaces_except_the_network() {
        let translated = translate(&namespaces(&ALL), &Placement::Single, HostNamespaces::Refuse).unwrap();
        assert_eq!(kept(&translated), ["pid", "ipc", "uts", "mnt", "cgroup"]);
        assert_eq!(translated.network, Network::Loopback);
        assert_eq!(translated.pid, PidNamespace::Specified);
    }

    #[test]
    fn member_shares_the_namespaces_of_its_pod() {
        let spec = namespaces(&[
            ("pid", ""),
            ("ipc", "/proc/41/ns/ipc"),
            ("uts", "/proc/41/ns/uts"),
            ("mount", ""),
            ("network", "/proc/41/ns/net"),
        ]);
        let translated = translate(&spec, &member(), HostNamespaces::Refuse).unwrap();
        assert_eq!(kept(&translated), ["pid", "mnt"]);
        assert_eq!(translated.network, Network::Namespace("/proc/41/ns/net".into()));
    }

    #[test]
    fn member_with_a_user_namespace_gets_a_new_one() {
        let spec = [("user", "/proc/41/ns/user"), ("pid", ""), ("ipc", "/proc/41/ns/ipc")];
        let translated = translate(&namespaces(&spec), &member(), HostNamespaces::Refuse).unwrap();
        assert_eq!(kept(&translated), ["user", "pid", "mnt"]);
        assert_eq!(translated.guest[0].path(), &None);
    }

    #[test]
    fn pid_namespace_of_a_member_is_new_or_that_of_a_task() {
        for (path, expected) in [
            ("", PidNamespace::Specified),
            ("/proc/41/ns/pid", PidNamespace::Task(41)),
        ] {
            let spec = namespaces(&[("pid", path), ("ipc", "")]);
            let translated = translate(&spec, &member(), HostNamespaces::Refuse).unwrap();
            assert_eq!(translated.pid, expected, "{path}");
            let has_own = kept(&translated).contains(&"pid".to_owned());
            assert_eq!(has_own, expected == PidNamespace::Specified);
        }
        for path in ["/run/pid", "/proc/self/ns/pid", "/proc/41/ns/net"] {
            let spec = namespaces(&[("pid", path), ("ipc", "")]);
            let translated = translate(&spec, &member(), HostNamespaces::Refuse).unwrap();
            assert_eq!(translated.pid, PidNamespace::Pod, "{path}");
        }
    }

    #[test]
    fn host_namespaces_are_refused_or_replaced_by_the_pods() {
        for (spec, field) in [(vec![("ipc", "")], "hostPID"), (vec![("pid", "")], "hostIPC")] {
            let mut spec = namespaces(&spec);
            for placement in [Placement::Single, member()] {
                let error = translate(&spec, &placement, HostNamespaces::Refuse).unwrap_err();
                assert!(error.to_string().starts_with(field), "{error}");
                translate(&spec, &placement, HostNamespaces::Pod).unwrap();
            }
            spec.extend(namespaces(&[("network", "/run/netns/x")]));
            let error = sandbox_network(&spec, HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
            sandbox_network(&spec, HostNamespaces::Pod).unwrap();
        }
        let translated = translate(&namespaces(&[("ipc", "")]), &member(), HostNamespaces::Pod).unwrap();
        assert_eq!(translated.pid, PidNamespace::Pod);
    }

    #[test]
    fn sandbox_without_a_network_namespace_is_refused_or_has_the_machines_network() {
        for (host, allowed) in [
            (HostNamespaces::Refuse, false),
            (HostNamespaces::Pod, false),
            (HostNamespaces::PodAndNetwork, true),
        ] {
            let network = |path| sandbox_network(&namespaces(&[("pid", ""), ("ipc", ""), ("network", path)]), host);
            assert_eq!(network("").unwrap(), Network::Loopback);
            assert_eq!(
                network("/run/netns/x").unwrap(),
                Network::Namespace("/run/netns/x".into())
            );
            match sandbox_network(&namespaces(&[("pid", ""), ("ipc", "")]), host) {
                Ok(network) => assert!(allowed && network == Network::Loopback, "{host:?}"),
                Err(error) => assert!(!allowed && error.to_string().starts_with("hostNetwork"), "{error}"),
            }
        }
    }

    #[test]
    fn missing_network_namespace_means_the_hosts_or_the_machines_network() {
        for (host, expected) in [
            (HostNamespaces::Refuse, Network::Host),
            (HostNamespaces::Pod, Network::Host),
            (HostNamespaces::PodAndNetwork, Network::Loopback),
        ] {
            for placement in [Placement::Single, member()] {
                let spec = namespaces(&[("pid", ""), ("ipc", "")]);
                let translated = translate(&spec, &placement, host).unwrap();
                assert_eq!(translated.network, expected, "{host:?} {placement:?}");
            }
        }
    }

    #[test]
    fn missing_pid_and_mount_namespaces_are_added() {
        let translated = translate(&[], &Placement::Single, HostNamespaces::Pod).unwrap();
        assert_eq!(kept(&translated), ["pid", "mnt"]);
    }

    #[test]
    fn unsupported_namespaces_are_errors_that_name_them() {
        for (spec, named) in [
            (vec![("user", "/proc/1/ns/user")], "user"),
            (vec![("pid", "/proc/1/ns/pid")], "/proc/1/ns/pid"),
            (vec![("ipc", "/proc/1/ns/ipc")], "ipc"),
            (vec![("uts", "/proc/1/ns/uts")], "uts"),
            (vec![("mount", "/proc/1/ns/mnt")], "/proc/1/ns/mnt"),
            (vec![("cgroup", "/x")], "cgroup"),
            (vec![("pid", ""), ("pid", "")], "twice"),
        ] {
            let error = translate(&namespaces(&spec), &Placement::Single, HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
        let mount = namespaces(&[("mount", "/proc/1/ns/mnt")]);
        assert!(translate(&mount, &member(), HostNamespaces::Pod).is_err());
    }
}
