//! The resources that a pod needs from the host, derived from the plan of its container or sandbox.

use std::path::PathBuf;

use nutshell_protocol::SetUpPod;

use super::{
    cgroup::ControlGroup,
    error::PodError,
    root_disk::{self, DiskContents},
};
use crate::{
    oci::{CgroupPath, Plan, PodPlan, PodSize, Root, Size},
    shim::machine::BootDisk,
};

/// How many disks the containers of a pod can have at a time.
const MAX_MEMBER_DISKS: u32 = 8;

/// The size of the machine that reads a disk. It boots, mounts file systems and copies two files.
pub(super) const DISK_READER_SIZE: Size = Size {
    memory: 256 << 20,
    vcpus: 1,
};

/// What [`Pod::start`](super::Pod::start) needs: resources that are already open, and descriptions of those that it
/// creates.
#[derive(Debug)]
pub(crate) struct PodRequirements {
    pub(super) size: PodSize,
    pub(super) file_server: bool,
    /// What the first machine runs.
    pub(super) first_guest: FirstGuest,
    /// Disks that the machine boots with.
    pub(super) disks: Vec<BootDisk>,
    /// How many disk slots are empty at boot.
    pub(super) hotplug_disks: u32,
    pub(super) cgroup: Option<ControlGroup>,
    /// Of the container; `None` if the pod's containers are not known yet.
    pub(super) oom_score_adj: Option<i32>,
    /// The settings that several containers share; `None` for a single container, which has no sandbox.
    pub(super) set_up_request: Option<SetUpPod>,
}

/// What the first machine of a pod runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstGuest {
    Containers,
    /// The disk reader, which finds the kernel of a user's disk.
    DiskReader,
    /// A user's kernel, which is booted later.
    User,
}

impl PodRequirements {
    /// For a virtual machine of `size`. If there is a `disk`, the first machine is the disk reader, which finds the
    /// kernel there. Otherwise the first machine boots the kernel itself.
    pub(crate) fn for_virtual_machine(
        cgroup: Option<&CgroupPath>,
        oom_score_adj: i32,
        size: Size,
        disk: Option<BootDisk>,
    ) -> Result<Self, PodError> {
        let (first_guest, size) = match disk {
            Some(_) => (FirstGuest::DiskReader, DISK_READER_SIZE),
            None => (FirstGuest::User, size),
        };
        Ok(Self {
            size: PodSize::fixed(size),
            file_server: false,
            first_guest,
            disks: disk.into_iter().collect(),
            hotplug_disks: 0,
            cgroup: find_cgroup(cgroup)?,
            oom_score_adj: Some(oom_score_adj),
            set_up_request: None,
        })
    }

    /// For a machine with one container. Also returns what is on the disk of its root file system, if it has one.
    pub(crate) async fn for_container(plan: &Plan) -> Result<(Self, Option<DiskContents>), PodError> {
        let (disk, contents) = match &plan.root {
            Root::Share { .. } => (None, None),
            Root::Disk(root) => {
                let (disk, contents) = root_disk::open(root.clone()).await?;
                (Some(BootDisk::Plain(disk)), Some(contents))
            }
        };
        let requirements = Self {
            size: PodSize::fixed(plan.size),
            file_server: disk.is_none() || !plan.shares.is_empty(),
            first_guest: FirstGuest::Containers,
            disks: disk.into_iter().collect(),
            hotplug_disks: 0,
            cgroup: find_cgroup(plan.cgroup.as_ref())?,
            oom_score_adj: Some(plan.oom_score_adj),
            set_up_request: None,
        };
        Ok((requirements, contents))
    }

    /// For a machine that any number of containers may join. `set_up_request` has the settings that they share. The
    /// memory at boot is limited to the memory limit of the pod's control group.
    pub(crate) fn for_pod(plan: &PodPlan, set_up_request: SetUpPod) -> Result<Self, PodError> {
        let cgroup = find_cgroup(plan.cgroup.as_ref())?;
        let limit = cgroup.as_ref().and_then(ControlGroup::memory_limit);
        let size = plan.size.bound_boot_memory(limit);
        if let Some(group) = cgroup.as_ref().filter(|_| size != plan.size) {
            log::warn!(
                "control group {}: its memory limit is {} MiB, so the pod's virtual machine gets {} MiB instead of \
                 {} MiB; give its RuntimeClass more overhead",
                group.path().display(),
                limit.unwrap_or_default() >> 20,
                size.boot.memory >> 20,
                plan.size.boot.memory >> 20
            );
        }
        Ok(Self {
            size,
            file_server: true,
            first_guest: FirstGuest::Containers,
            disks: Vec::new(),
            hotplug_disks: MAX_MEMBER_DISKS,
            cgroup,
            oom_score_adj: None,
            set_up_request: Some(set_up_request),
        })
    }

    /// The control groups that [`Pod::start`](super::Pod::start) will create, as absolute paths.
    pub(crate) fn cgroup_paths(&self) -> Vec<PathBuf> {
        self.cgroup.iter().map(|cgroup| cgroup.path().to_owned()).collect()
    }
}

fn find_cgroup(path: Option<&CgroupPath>) -> Result<Option<ControlGroup>, PodError> {
    Ok(path.map(ControlGroup::find).transpose()?.flatten())
}
