//! The root file system of a container.

use serde::{Deserialize, Serialize};

/// The source of a container's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rootfs {
    /// A directory below [`crate::SHARE_PATH`], which the agent bind-mounts.
    Share {
        /// The path relative to [`crate::SHARE_PATH`], without `..`.
        path: String,
    },
    /// A file system on a virtio-blk device (see [`crate::disk_serial`]).
    Disk {
        /// Counted from 0, as for [`crate::disk_serial`].
        slot: u32,
        /// The file system type, as for mount(2).
        filesystem: String,
        /// Mount options in the form of fstab(5), such as `ro`, `noatime` or `discard`.
        options: Vec<String>,
    },
    /// Several file systems (layers) on one virtio-blk device, from which the root is assembled.
    Layers {
        /// Counted from 0, as for [`crate::disk_serial`].
        slot: u32,
        /// The parts of the disk, each with a file system, or with data for one.
        parts: Vec<DiskPart>,
        /// The file systems to mount.
        layers: Vec<Layer>,
        /// How the root is assembled from the layers.
        root: LayeredRoot,
    },
}

/// A part of a disk. Parts do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// The offset of the first byte, a multiple of 512.
    pub start: u64,
    /// The size in bytes, a multiple of 512.
    pub length: u64,
}

/// A file system of a [`Rootfs::Layers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The index of its part.
    pub part: u32,
    /// The indexes of the parts with the file contents of an EROFS file system that has only metadata, in the order of
    /// its device table.
    pub devices: Vec<u32>,
    /// The file system type, as for mount(2).
    pub filesystem: String,
    /// Mount options in the form of fstab(5), without `device=`.
    pub options: Vec<String>,
}

/// The root of a [`Rootfs::Layers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayeredRoot {
    /// The directories to create before the root is mounted. Those that exist keep their mode and owner.
    pub directories: Vec<NewDirectory>,
    /// Mounted after `directories` were created.
    pub mount: RootMount,
}

/// What is mounted at the root of a container that has a [`Rootfs::Layers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootMount {
    /// A directory of a layer.
    Directory {
        /// It becomes the root by a bind mount.
        path: LayerPath,
        /// Whether the container can only read.
        read_only: bool,
    },
    /// Directories of layers, one above the other (overlayfs).
    Overlay {
        /// The lower directories, topmost first.
        lower: Vec<LayerPath>,
        /// The upper and the work directory. `None` makes the overlay read-only.
        upper: Option<(LayerPath, LayerPath)>,
        /// More mount options in the form of fstab(5).
        options: Vec<String>,
    },
}

/// A directory of one of the layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPath {
    /// The index of the layer.
    pub layer: u32,
    /// The path below the layer's root directory, relative and without `..`; empty for that directory.
    pub path: String,
}

/// A directory to create, whose parent exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDirectory {
    /// Only its last component is created.
    pub path: LayerPath,
    /// The permission bits.
    pub mode: u32,
    /// The user and the group id of the owner.
    pub owner: (u32, u32),
}
