//! Plans: the resources and settings of a container or a pod, determined once when it is created.
//!
//! Belongs here: the types of a plan ([`Plan`], [`PodPlan`], [`VmPlan`]) and the checked values in them, and the two
//! sources of plans: an OCI bundle with the mounts of its snapshot ([`bundle`]), and CRI's message for a sandbox
//! without a bundle ([`pod`]). Does not belong here: I/O other than reading `config.json` and inspecting the sources of
//! bind mounts, and anything about ttrpc, KVM or the agent's channel. The shim calls [`BundleSpec`] and [`plan_pod`]
//! when a container or a sandbox is created, and [`read_annotations`] when a shim starts.

mod annotations;
mod bundle;
mod cgroup_path;
mod error;
mod host_namespaces;
mod id;
mod idmap;
mod limits;
mod plan;
mod pod;
mod size;
mod source;
mod spec;
mod vm_plan;

pub(crate) use annotations::read_annotations;
pub(crate) use bundle::{BundleSpec, GuestProcess, MAX_ROOT_FILES};
pub(crate) use cgroup_path::CgroupPath;
pub(crate) use error::PlanError;
pub(crate) use host_namespaces::HostNamespaces;
pub(crate) use id::{ContainerId, IdError};
pub(crate) use idmap::IdMap;
pub(crate) use limits::Limits;
pub(crate) use plan::{
    BundlePlan, GuestSpec, Hook, Hooks, HostFiles, HostMount, HostOverlay, Network, NewDiskFile, PidNamespace,
    Placement, Plan, PodPlan, PodShared, ReadOnly, ResolvConf, Root, RootDisk, RootLayer, Share, ShareIdMap,
};
pub(crate) use pod::plan_pod;
pub(crate) use size::{DEFAULT_MEMORY, DEFAULT_VCPUS, MAX_VCPUS, MIN_MEMORY, PodSize, Size, Sizing};
pub(crate) use source::{HostInspector, Inspect, MountRestrictions, SourceKind, lists_mount_below};
pub(crate) use vm_plan::{
    DataSource, DiskContent, DiskName, DiskSource, FileUser, MAX_VM_DISKS, OnReboot, VmDisk, VmExec, VmIdentity,
    VmImage, VmKernel, VmPlan, VmPolicy, VmSeed,
};
