//! Mounts in the file server's tree that several shares of a pod's containers can use.
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

/// The common shares of a pod. A source gets one at its first use.
#[derive(Debug, Default)]
pub(super) struct CommonShares {
    /// The number of the next common share. Numbers are not used again: the guest may still know the former files.
    next: u64,
    shares: Vec<CommonShare>,
}

/// A mount at `.shared/N` in the tree, which all shares of the pod with the same source use.
#[derive(Debug)]
pub(super) struct CommonShare {
    /// In the tree.
    pub(super) path: String,
    pub(super) source: SourceId,
    /// Mounts below the source are shared too.
    pub(super) recursive: bool,
    pub(super) id_map: Option<ShareIdMap>,
    /// The guest can write.
    pub(super) writable: bool,
    /// The paths of the shares that use it (`Share::path`).
    pub(super) share_paths: Vec<String>,
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

impl CommonShares {
    /// The common shares of `source` whose ids are mapped by `id_map`. There is more than one if mounts below the source
    /// kept an earlier one from being used again.
    pub(super) fn of_source(
        &mut self,
        source: SourceId,
        id_map: Option<&ShareIdMap>,
    ) -> impl Iterator<Item = &mut CommonShare> {
        let is_same = move |common: &&mut CommonShare| common.source == source && common.id_map.as_ref() == id_map;
        self.shares.iter_mut().filter(is_same)
    }

    /// The path of a new common share, which no other one has had.
    pub(super) fn new_path(&mut self) -> String {
        let number = self.next;
        self.next += 1;
        format!("{COMMON_SHARES}/{number}")
    }

    pub(super) fn add(&mut self, common: CommonShare) {
        self.shares.push(common);
    }

    /// Removes the shares whose path is `path` or below it. Returns the paths of the common shares that no share uses any
    /// more.
    pub(super) fn release(&mut self, path: &Path) -> Vec<PathBuf> {
        for common in &mut self.shares {
            common.share_paths.retain(|share| !Path::new(share).starts_with(path));
        }
        let unused = self.shares.extract_if(.., |common| common.share_paths.is_empty());
        unused.map(|common| PathBuf::from(common.path)).collect()
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
