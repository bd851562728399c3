//! The messages of Kubernetes' Container Runtime Interface from which a pod is planned: `PodSandboxConfig` and the
//! messages inside it.
//!
//! Names and numbers of fields are those of `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto` (package `runtime.v1`).
//! Only the fields that [`super::plan_pod`] reads are declared; the decoder skips all others. A decoded message is
//! well-formed but its values are unchecked: `plan_pod` converts them into the types of a plan.

use std::collections::BTreeMap;

use prost::Message;

/// The kubelet's configuration of a pod's sandbox.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSandboxConfig {
    #[prost(string, tag = "2")]
    pub(super) hostname: String,
    /// Absent if the runtime is to use the host's resolver.
    #[prost(message, optional, tag = "4")]
    pub(super) dns_config: Option<DnsConfig>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub(super) annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub(super) linux: Option<LinuxPodSandboxConfig>,
}

/// The contents of `/etc/resolv.conf`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DnsConfig {
    #[prost(string, repeated, tag = "1")]
    pub(super) servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(super) searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub(super) options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LinuxPodSandboxConfig {
    /// The pod's cgroup: a path, or a systemd slice. Empty if there is none.
    #[prost(string, tag = "1")]
    pub(super) cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    pub(super) security_context: Option<LinuxSandboxSecurityContext>,
    #[prost(btree_map = "string, string", tag = "3")]
    pub(super) sysctls: BTreeMap<String, String>,
    /// The sum of the limits of the pod's containers.
    #[prost(message, optional, tag = "5")]
    pub(super) resources: Option<LinuxContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LinuxSandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    pub(super) namespace_options: Option<NamespaceOption>,
}

/// Which namespaces the pod's containers use.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NamespaceOption {
    #[prost(enumeration = "NamespaceMode", tag = "1")]
    pub(super) network: i32,
    #[prost(enumeration = "NamespaceMode", tag = "2")]
    pub(super) pid: i32,
    #[prost(enumeration = "NamespaceMode", tag = "3")]
    pub(super) ipc: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(super) enum NamespaceMode {
    /// The containers of the pod share one namespace.
    Pod = 0,
    /// Each container has its own namespace.
    Container = 1,
    /// The namespace of the host.
    Node = 2,
    /// The namespace of another container.
    Target = 3,
}

/// Limits; 0 means unlimited.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LinuxContainerResources {
    /// In microseconds.
    #[prost(int64, tag = "1")]
    pub(super) cpu_period: i64,
    /// CPU time in each period, in microseconds.
    #[prost(int64, tag = "2")]
    pub(super) cpu_quota: i64,
    #[prost(int64, tag = "4")]
    pub(super) memory_limit_in_bytes: i64,
}
