//! Namespaces of the host in the spec of a pod: hostNetwork, hostPID and hostIPC.

use serde::Deserialize;

use super::PlanError;

/// Why hostNetwork is refused.
pub(super) const HOST_NETWORK: &str = "a virtual machine cannot share the network of its host";

/// The meaning of hostPID and hostIPC for a pod, from the host's configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HostNamespaces {
    /// An error: a machine has none of the host's namespaces.
    #[default]
    Refuse,
    /// The pod's namespaces: its containers share them.
    Pod,
}

impl HostNamespaces {
    /// Refuses a namespace of the host, unless it is configured to mean the pod's. `field` is the field in Kubernetes,
    /// `kind` the type of the namespace, which the spec does not list.
    pub(super) fn refuse_unless_pod(self, field: &str, kind: &str) -> Result<(), PlanError> {
        match self {
            Self::Pod => Ok(()),
            Self::Refuse => Err(PlanError::unsupported(
                format!("{field} (linux.namespaces: no {kind})"),
                format!(
                    "a virtual machine cannot share the {kind} namespace of its host. To use the pod's instead, set \
                     `host_namespaces = \"pod\"` in section [pod] of the configuration"
                ),
            )),
        }
    }
}
