//! The groups of containers that share a shim.

use std::collections::HashMap;

/// A group of containers that one shim serves.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// A pod, by the id of its sandbox. The sandbox's container is created first and deleted last.
    Pod(String),
    /// A group with a user-defined name. Its members can be deleted in any order.
    Named(String),
}

impl Group {
    /// Reads the group from the annotations of a spec, as runc's shim does (containerd
    /// `cmd/containerd-shim-runc-v2/manager`). `None` if the container has a shim to itself. A container of Kubernetes
    /// belongs to its pod, whatever group its other annotations name: they come from the pod's author, who must not
    /// choose the shim of another pod.
    pub(super) fn from_annotations(annotations: &HashMap<String, String>) -> Option<Self> {
        let value = |name| annotations.get(name).filter(|value| !value.is_empty()).cloned();
        value("io.kubernetes.cri.sandbox-id").map(Self::Pod).or_else(|| {
            value("io.containerd.nutshell.v2.group")
                .or_else(|| value("io.containerd.runc.v2.group"))
                .map(Self::Named)
        })
    }

    /// The group's key, which is part of the name of its shim's socket. The key of a pod, or of a container without a
    /// group, is an id. The key of a named group has a colon, which no id has.
    pub(super) fn into_key(self) -> String {
        match self {
            Self::Pod(id) => id,
            Self::Named(name) => format!("group:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_id_precedes_named_groups() {
        let ours = ("io.containerd.nutshell.v2.group", "a");
        let runcs = ("io.containerd.runc.v2.group", "b");
        let pods = ("io.kubernetes.cri.sandbox-id", "c");
        let named = |name: &str| Some(Group::Named(name.to_owned()));
        for (annotations, group) in [
            (vec![ours, runcs, pods], Some(Group::Pod("c".to_owned()))),
            (vec![pods, runcs], Some(Group::Pod("c".to_owned()))),
            (vec![ours, runcs], named("a")),
            (vec![runcs], named("b")),
            (vec![pods], Some(Group::Pod("c".to_owned()))),
            (vec![(pods.0, "")], None),
            (vec![("other", "x")], None),
        ] {
            let annotations = annotations
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            assert_eq!(Group::from_annotations(&annotations.collect()), group);
        }
    }

    #[test]
    fn named_group_has_another_key_than_a_pod_with_its_name() {
        let pod = Group::Pod("victim".to_owned());
        let group = Group::Named("victim".to_owned());
        assert_ne!(pod.into_key(), group.into_key());
    }
}
