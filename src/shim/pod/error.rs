//! The failures of a pod.

use std::path::PathBuf;

use super::cgroup::CgroupError;
use crate::shim::{
    blocking::BlockingError,
    machine::{BootError, VmmError},
    network::NetworkError,
    share::ShareError,
};

/// Why a pod cannot be started, or cannot take a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    ControlGroup(#[from] CgroupError),
    /// The vmm cannot plug a disk.
    #[error("cannot plug the disk {} into the virtual machine: {source}", path.display())]
    Disk { path: PathBuf, source: VmmError },
    /// The file of a root file system cannot be created.
    #[error("cannot create the disk {} of the root file system: {reason}", path.display())]
    NewDisk { path: PathBuf, reason: String },
    /// Every disk slot is taken.
    #[error(
        "the pod's virtual machine has no slot left for another disk: at most {max} at a time. Run fewer containers in the \
         pod, or use the snapshotter overlayfs"
    )]
    NoSlot { max: u32 },
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The machine was started without a file server.
    #[error("cannot share files with the virtual machine: it has no file server")]
    NotShared,
    /// The pod has ended meanwhile.
    #[error("the pod has ended")]
    Ended,
    /// A file system of the host hangs.
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}
