//! The spec's namespaces to the guest's.
//!
//! A path of a namespace names one of the host. It is never opened here, and never means anything
//! to the guest: the network's is handed on, a pod's others are tokens for what all of its machine
//! shares (containerd's CRI makes them from the sandbox's pid).

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use super::{HostNamespaces, Network, PidNamespace, Placement, PlanError};

#[derive(Debug)]
pub(super) struct Namespaces {
    pub(super) guest: Vec<LinuxNamespace>,
    pub(super) network: Network,
    pub(super) pid: PidNamespace,
}

/// What the pod's network would have to be, and is not.
pub(super) const HOST_NETWORK: &str = "a virtual machine cannot share the network of its host";

/// For a pod's sandbox, of whose namespaces only the network's is one: its network.
pub(super) fn of_sandbox(namespaces: &[LinuxNamespace], host: HostNamespaces) -> Result<Network, PlanError> {
    refuse_repetition(namespaces)?;
    let of = |kind| namespaces.iter().find(|namespace| namespace.typ() == kind);
    if of(LinuxNamespaceType::Pid).is_none() {
        refuse_host("hostPID", "pid", host)?;
    }
    if of(LinuxNamespaceType::Ipc).is_none() {
        refuse_host("hostIPC", "ipc", host)?;
    }
    match of(LinuxNamespaceType::Network).map(path) {
        Some(None) => Ok(Network::Loopback),
        Some(Some(path)) => Ok(Network::Namespace(path.to_owned())),
        None => Err(PlanError::unsupported(
            "hostNetwork (linux.namespaces: no network)",
            HOST_NETWORK,
        )),
    }
}

/// Refuses a namespace of the host, unless that is to mean the pod's.
pub(super) fn refuse_host(field: &str, kind: &str, host: HostNamespaces) -> Result<(), PlanError> {
    match host {
        HostNamespaces::Pod => Ok(()),
        HostNamespaces::Refuse => Err(PlanError::unsupported(
            format!("{field} (linux.namespaces: no {kind})"),
            "a virtual machine has no part in its host's; with `host_namespaces = \"pod\"` in section [pod] of the \
             configuration it means the pod's own",
        )),
    }
}

fn refuse_repetition(namespaces: &[LinuxNamespace]) -> Result<(), PlanError> {
    for (index, namespace) in namespaces.iter().enumerate() {
        let kind = namespace.typ();
        if namespaces[..index].iter().any(|earlier| earlier.typ() == kind) {
            return Err(PlanError::invalid("linux.namespaces", format!("{kind} is there twice")));
        }
    }
    Ok(())
}

fn path(namespace: &LinuxNamespace) -> Option<&Path> {
    namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty())
}

pub(super) fn translate(
    namespaces: &[LinuxNamespace],
    placement: &Placement,
    host: HostNamespaces,
) -> Result<Namespaces, PlanError> {
    refuse_repetition(namespaces)?;
    let mut translated = Namespaces {
        guest: Vec::new(),
        network: Network::Host,
        pid: PidNamespace::Specified,
    };
    let single = *placement == Placement::Single;
    for namespace in namespaces {
        match (namespace.typ(), path(namespace)) {
            // Its mapping is in the spec of every member: one of its own is as good as the pod's.
            (LinuxNamespaceType::User, Some(_)) if !single => {
                let mut user = LinuxNamespace::default();
                user.set_typ(LinuxNamespaceType::User);
                translated.guest.push(user);
            }
            (LinuxNamespaceType::Network, None) => translated.network = Network::Loopback,
            (LinuxNamespaceType::Network, Some(path)) => translated.network = Network::Namespace(path.to_owned()),
            (LinuxNamespaceType::Pid, Some(path)) if !single => {
                translated.pid = task(path).map(PidNamespace::Task).ok_or_else(|| {
                    let reason = format!("{} is no /proc/<pid>/ns/pid of a container of the pod", path.display());
                    PlanError::unsupported("linux.namespaces: pid", reason)
                })?;
            }
            (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, _) if !single => {}
            (kind, Some(path)) => {
                return Err(PlanError::unsupported(
                    format!("linux.namespaces: {kind}"),
                    format!("a machine cannot join the host's namespace {}", path.display()),
                ));
            }
            (_, None) => translated.guest.push(namespace.clone()),
        }
    }
    if !single {
        let lacks = |kind| !namespaces.iter().any(|namespace| namespace.typ() == kind);
        if lacks(LinuxNamespaceType::Ipc) {
            refuse_host("hostIPC", "ipc", host)?;
        }
        if lacks(LinuxNamespaceType::Pid) {
            refuse_host("hostPID", "pid", host)?;
            translated.pid = PidNamespace::Pod;
        }
    }
    // No container of a machine may see the agent's mounts, whatever the spec leaves out.
    if !translated
        .guest
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Mount)
    {
        let mut mount = LinuxNamespace::default();
        mount.set_typ(LinuxNamespaceType::Mount);
        translated.guest.push(mount);
    }
    Ok(translated)
}

/// The pid in `/proc/<pid>/ns/pid`.
fn task(path: &Path) -> Option<u32> {
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
    fn single_has_all_of_its_own_but_the_network() {
        let translated = translate(&namespaces(&ALL), &Placement::Single, HostNamespaces::Refuse).unwrap();
        assert_eq!(kept(&translated), ["pid", "ipc", "uts", "mnt", "cgroup"]);
        assert_eq!(translated.network, Network::Loopback);
        assert_eq!(translated.pid, PidNamespace::Specified);
    }

    #[test]
    fn member_shares_what_its_pod_has() {
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
    fn user_namespace_of_a_member_is_made_from_the_pods_mapping() {
        let spec = [("user", "/proc/41/ns/user"), ("pid", ""), ("ipc", "/proc/41/ns/ipc")];
        let translated = translate(&namespaces(&spec), &member(), HostNamespaces::Refuse).unwrap();
        assert_eq!(kept(&translated), ["user", "pid", "mnt"]);
        assert_eq!(translated.guest[0].path(), &None);
    }

    #[test]
    fn pid_namespace_of_a_member_is_new_or_a_tasks() {
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
            let error = translate(&spec, &member(), HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn namespaces_of_the_host_are_refused_or_mean_the_pods() {
        for (spec, field) in [(vec![("ipc", "")], "hostPID"), (vec![("pid", "")], "hostIPC")] {
            let mut spec = namespaces(&spec);
            let error = translate(&spec, &member(), HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
            translate(&spec, &member(), HostNamespaces::Pod).unwrap();
            spec.extend(namespaces(&[("network", "/run/netns/x")]));
            let error = of_sandbox(&spec, HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
            of_sandbox(&spec, HostNamespaces::Pod).unwrap();
        }
        let translated = translate(&namespaces(&[("ipc", "")]), &member(), HostNamespaces::Pod).unwrap();
        assert_eq!(translated.pid, PidNamespace::Pod);
    }

    #[test]
    fn sandbox_has_a_network_of_its_own_whatever_is_configured() {
        for host in [HostNamespaces::Refuse, HostNamespaces::Pod] {
            let network = |path| of_sandbox(&namespaces(&[("pid", ""), ("ipc", ""), ("network", path)]), host);
            assert_eq!(network("").unwrap(), Network::Loopback);
            assert_eq!(
                network("/run/netns/x").unwrap(),
                Network::Namespace("/run/netns/x".into())
            );
            let error = of_sandbox(&namespaces(&[("pid", ""), ("ipc", "")]), host).unwrap_err();
            assert!(error.to_string().starts_with("hostNetwork"), "{error}");
        }
    }

    #[test]
    fn no_network_namespace_means_the_hosts_network_and_no_mount_namespace_gets_one() {
        let translated = translate(&[], &Placement::Single, HostNamespaces::Refuse).unwrap();
        assert_eq!(translated.network, Network::Host);
        assert_eq!(kept(&translated), ["mnt"]);
    }

    #[test]
    fn namespaces_that_a_machine_cannot_have_are_errors_that_name_them() {
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
