//! The spec's namespaces to the guest's.
//!
//! A path of a namespace names one of the host. It is never opened here, and never means anything
//! to the guest: the network's is handed on, a pod's others are tokens for what all of its machine
//! shares (containerd's CRI makes them from the sandbox's pid).

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use super::{Network, PidNamespace, Placement, PlanError};

#[derive(Debug)]
pub(super) struct Namespaces {
    pub(super) guest: Vec<LinuxNamespace>,
    pub(super) network: Network,
    pub(super) pid: PidNamespace,
}

pub(super) fn translate(namespaces: &[LinuxNamespace], placement: &Placement) -> Result<Namespaces, PlanError> {
    let mut translated = Namespaces {
        guest: Vec::new(),
        network: Network::Host,
        pid: PidNamespace::Machine,
    };
    let single = *placement == Placement::Single;
    for (index, namespace) in namespaces.iter().enumerate() {
        let kind = namespace.typ();
        if namespaces[..index].iter().any(|earlier| earlier.typ() == kind) {
            return Err(PlanError::invalid("linux.namespaces", format!("{kind} is there twice")));
        }
        let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
        match (kind, path) {
            // Its mapping is in the spec of every member: one of its own is as good as the pod's.
            (LinuxNamespaceType::User, Some(_)) if !single => {
                let mut user = LinuxNamespace::default();
                user.set_typ(LinuxNamespaceType::User);
                translated.guest.push(user);
            }
            (LinuxNamespaceType::Network, None) => translated.network = Network::Loopback,
            (LinuxNamespaceType::Network, Some(path)) => translated.network = Network::Namespace(path.to_owned()),
            (LinuxNamespaceType::Pid, None) => {
                translated.pid = PidNamespace::New;
                translated.guest.push(namespace.clone());
            }
            (LinuxNamespaceType::Pid, Some(path)) if !single => {
                translated.pid = task(path).map_or(PidNamespace::Machine, PidNamespace::Task);
            }
            (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, _) if !single => {}
            (_, Some(path)) => {
                return Err(PlanError::unsupported(
                    format!("linux.namespaces: {kind}"),
                    format!("a machine cannot join the host's namespace {}", path.display()),
                ));
            }
            (_, None) => translated.guest.push(namespace.clone()),
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
        let translated = translate(&namespaces(&ALL), &Placement::Single).unwrap();
        assert_eq!(kept(&translated), ["pid", "ipc", "uts", "mnt", "cgroup"]);
        assert_eq!(translated.network, Network::Loopback);
        assert_eq!(translated.pid, PidNamespace::New);
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
        let translated = translate(&spec, &member()).unwrap();
        assert_eq!(kept(&translated), ["pid", "mnt"]);
        assert_eq!(translated.network, Network::Namespace("/proc/41/ns/net".into()));
    }

    #[test]
    fn user_namespace_of_a_member_is_made_from_the_pods_mapping() {
        let translated = translate(&namespaces(&[("user", "/proc/41/ns/user")]), &member()).unwrap();
        assert_eq!(kept(&translated), ["user", "mnt"]);
        assert_eq!(translated.guest[0].path(), &None);
    }

    #[test]
    fn pid_namespace_of_a_member_is_new_the_machines_or_a_tasks() {
        for (spec, expected) in [
            (vec![("pid", "")], PidNamespace::New),
            (vec![], PidNamespace::Machine),
            (vec![("pid", "/proc/41/ns/pid")], PidNamespace::Task(41)),
            (vec![("pid", "/run/pid")], PidNamespace::Machine),
            (vec![("pid", "/proc/self/ns/pid")], PidNamespace::Machine),
        ] {
            let translated = translate(&namespaces(&spec), &member()).unwrap();
            assert_eq!(translated.pid, expected, "{spec:?}");
            assert_eq!(
                kept(&translated).contains(&"pid".to_owned()),
                expected == PidNamespace::New
            );
        }
    }

    #[test]
    fn no_network_namespace_means_the_hosts_network_and_no_mount_namespace_gets_one() {
        let translated = translate(&[], &Placement::Single).unwrap();
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
            let error = translate(&namespaces(&spec), &Placement::Single).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
        assert!(translate(&namespaces(&[("mount", "/proc/1/ns/mnt")]), &member()).is_err());
    }
}
