//! Places of the tree that several mounts of a pod's containers use.
//!
//! In the guest, a socket, a lock or a mapping belongs to an inode, and a file that the guest reaches by two mounts has
//! two inodes. So a directory that is mounted at two paths, or in two containers of a pod, is one mount of the tree,
//! and all of them get its path.

use std::{
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use nutshell_protocol::COMMON_SHARES;
use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::oci::ShareIdMap;

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): a mount id that no later mount gets. Older kernels ignore the flag, and return
/// ids that a later mount can get after an unmount.
const UNIQUE_MOUNT_ID: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The places of a pod.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The number of the next place. Numbers are not used again: the guest may still know the former files.
    next: u64,
    places: Vec<Place>,
}

#[derive(Debug)]
pub(super) struct Place {
    /// In the tree.
    pub(super) path: String,
    pub(super) source: SourceId,
    /// Mounts below the source are shared too.
    pub(super) recursive: bool,
    pub(super) id_map: Option<ShareIdMap>,
    /// The guest can write.
    pub(super) writable: bool,
    /// The paths of the shares that use it (`Share::path`).
    pub(super) users: Vec<String>,
}

/// What a path of the host leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceId {
    /// The id of the mount: other mounts of the same directory can have other options and other mounts below them.
    mount: u64,
    /// The major and minor number of the file system.
    device: (u32, u32),
    inode: u64,
}

impl Places {
    /// The places of a source with these ids. They differ in what is mounted below the source.
    pub(super) fn of_source(
        &mut self,
        source: SourceId,
        id_map: Option<&ShareIdMap>,
    ) -> impl Iterator<Item = &mut Place> {
        let is_same = move |place: &&mut Place| place.source == source && place.id_map.as_ref() == id_map;
        self.places.iter_mut().filter(is_same)
    }

    /// The path of a new place, which no other place has had.
    pub(super) fn new_path(&mut self) -> String {
        let number = self.next;
        self.next += 1;
        format!("{COMMON_SHARES}/{number}")
    }

    pub(super) fn add(&mut self, place: Place) {
        self.places.push(place);
    }

    /// Removes the users at `path` and below it. Returns the paths of the places that have no
    /// users left.
    pub(super) fn leave(&mut self, path: &Path) -> Vec<PathBuf> {
        for place in &mut self.places {
            place.users.retain(|user| !Path::new(user).starts_with(path));
        }
        let unused = self.places.extract_if(.., |place| place.users.is_empty());
        unused.map(|place| PathBuf::from(place.path)).collect()
    }
}

/// Identifies an opened directory or file of the host, and the mount by which it was opened.
pub(super) fn source_id(source: BorrowedFd<'_>) -> io::Result<SourceId> {
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID | UNIQUE_MOUNT_ID;
    let status = statx(source, "", AtFlags::EMPTY_PATH, wanted)?;
    Ok(SourceId {
        mount: status.stx_mnt_id,
        device: (status.stx_dev_major, status.stx_dev_minor),
        inode: status.stx_ino,
    })
}
