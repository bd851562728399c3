//! Shares of the containers of a pod, in [`super::common_shares`].

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{MountAttrFlags, OpenTreeFlags, open_tree},
};

use super::{
    FileServer, ShareError, apply_options,
    common_shares::{CommonShare, source_id},
    detached::clone_mount_of,
    error::attach_error,
    run_in_thread,
};
use crate::{
    jail::{FailedStep, step, syscalls::clear_mount_attributes},
    oci::{ReadOnly, Share, lists_mount_below},
};

impl FileServer {
    /// Shares a directory or a file of the host for a container of a pod. Returns its path in the tree, which is that
    /// of an earlier share if that has the same source. To detach it, use the share's own path.
    pub(crate) fn attach_in_pod(&self, share: &Share) -> Result<String, ShareError> {
        run_in_thread(|| {
            self.find_or_make_common_share(share)
                .map_err(attach_error(&share.source, &share.path))
        })
    }

    fn find_or_make_common_share(&self, share: &Share) -> Result<String, FailedStep> {
        // Calls that a file system can delay come before the lock, for which other containers wait.
        // Unlike open(2) with O_PATH, open_tree(2) triggers an automount at the path.
        let source = open_tree(CWD, &share.source, OpenTreeFlags::OPEN_TREE_CLOEXEC).map_err(step("open it"))?;
        let id = source_id(source.as_fd()).map_err(step("read its inode number"))?;
        let mount = clone_mount_of(source.as_fd(), share.recursive).map_err(step("copy its mount"))?;
        apply_options(mount.as_fd(), share)?;

        let mut common_shares = self.common_shares.lock();
        let writable = share.read_only == ReadOnly::None;
        for common in common_shares.of_source(id, share.id_map.as_ref()) {
            let has_mounts_below = self.has_mounts_below(share, source.as_fd(), common);
            if has_mounts_below.map_err(step("look for mounts below it"))? {
                continue;
            }
            if writable && !common.writable {
                self.make_writable(Path::new(&common.path))
                    .map_err(step("make it writable"))?;
                common.writable = true;
            }
            common.share_paths.push(share.path.clone());
            return Ok(common.path.clone());
        }
        let path = common_shares.new_path();
        if let Err(error) = self.attach_detached(&mount, &path, false) {
            // The step that failed may be the one that enters the namespace, in which `remove` unmounts.
            if let Err(error) = self.enter().and_then(|()| self.remove(Path::new(&path))) {
                log::warn!("cannot remove {path} from the tree of shared files: {error}");
            }
            return Err(error);
        }
        common_shares.add(CommonShare {
            path: path.clone(),
            source: id,
            recursive: share.recursive,
            id_map: share.id_map.clone(),
            writable,
            share_paths: vec![share.path.clone()],
        });
        Ok(path)
    }

    /// Whether there are mounts below the source of `share`, which is opened as `source`, or below `common`: they can
    /// differ, because mounts that the host makes later than `common` appear only in the source.
    fn has_mounts_below(&self, share: &Share, source: BorrowedFd<'_>, common: &CommonShare) -> io::Result<bool> {
        if share.recursive {
            let path = std::fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
            if lists_mount_below(&std::fs::read("/proc/thread-self/mountinfo")?, &path) {
                return Ok(true);
            }
        }
        if common.recursive {
            let table = std::fs::read(format!("/proc/{}/mountinfo", self.child.id()))?;
            return Ok(lists_mount_below(&table, &Path::new("/").join(&common.path)));
        }
        Ok(false)
    }

    /// Makes a read-only mount of the tree writable. Leaves the calling thread in the file server's mount namespace.
    fn make_writable(&self, path: &Path) -> io::Result<()> {
        self.enter()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mount = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)?;
        clear_mount_attributes(mount.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY)
    }
}
