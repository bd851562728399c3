//! Bundle to plan: what a container needs from its machine, decided once from the bundle's
//! `config.json` and the mounts that containerd sent.
//!
//! Lives here: the types of a [`Plan`] and the pure translation into them. May not live here: any
//! I/O beyond reading `config.json` and looking at what a bind mount's source is, anything that
//! knows of ttrpc, KVM or the agent's channel. The shim calls [`plan_bundle`] when a container is created,
//! [`plan_pod`] when a sandbox is created that has no bundle to plan, and [`read_annotations`] when a shim
//! starts.

mod annotations;
mod cri;
mod devices;
mod error;
mod id;
mod idmap;
mod limits;
mod mounts;
mod namespaces;
mod plan;
mod pod;
mod rootfs;
mod size;
mod source;
mod spec;
mod translate;

pub(crate) use annotations::read_annotations;
pub(crate) use error::PlanError;
pub(crate) use id::{ContainerId, IdError};
pub(crate) use idmap::IdMap;
pub(crate) use limits::Limits;
pub(crate) use plan::{
    BundlePlan, Hook, Hooks, HostMount, HostNamespaces, Network, PidNamespace, Placement, Plan, PodPlan, PodShared,
    ResolvConf, Root, Share, ShareIdMap,
};
pub(crate) use pod::plan_pod;
pub(crate) use size::{DEFAULT_MEMORY, DEFAULT_VCPUS, MAX_VCPUS, MIN_MEMORY, PodSize, Size, Sizing};
pub(crate) use source::{Inspect, SourceKind};
pub(crate) use translate::plan_bundle;
