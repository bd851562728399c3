//! Namespaces of the host in a spec, which are hostNetwork, hostPID and hostIPC in Kubernetes.

use serde::Deserialize;

use super::PlanError;

/// The meaning of the host's namespaces in a spec, from the host's configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum HostNamespaces {
    /// An error: a machine has none of the host's namespaces.
    #[default]
    Refuse,
    /// hostPID and hostIPC select the pod's namespaces, which its containers share. hostNetwork is an error.
    Pod,
    /// hostNetwork also selects the pod's network: the network of its machine.
    PodAndNetwork,
}

impl HostNamespaces {
    /// Refuses a namespace of the host, unless it is configured to mean the pod's. `field` is the field in Kubernetes,
    /// `kind` the type of the namespace, which the spec does not list.
    pub(super) fn refuse_unless_pod(self, field: &str, kind: &str) -> Result<(), PlanError> {
        match self {
            Self::Pod | Self::PodAndNetwork => Ok(()),
            Self::Refuse => Err(PlanError::unsupported(
                format!("{field} (linux.namespaces: no {kind})"),
                format!(
                    "a virtual machine cannot share the {kind} namespace of its host. To use the pod's instead, set \
                     `host_namespaces = \"pod\"` in section [pod] of the configuration"
                ),
            )),
        }
    }

    /// Refuses the host's network, unless it is configured to mean the machine's. `field` is the field in Kubernetes.
    pub(super) fn refuse_network_unless_pod(self, field: &str) -> Result<(), PlanError> {
        match self {
            Self::PodAndNetwork => Ok(()),
            Self::Refuse | Self::Pod => Err(PlanError::unsupported(
                field,
                "a virtual machine cannot share the network of its host. To use the machine's instead, set \
                 `host_namespaces = \"pod-and-network\"` in section [pod] of the configuration",
            )),
        }
    }
}
