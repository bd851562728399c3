//! Places of the tree that several mounts of a pod's containers use.
//!
//! In the guest, a socket, a lock or a mapping belongs to an inode, and a file that the guest reaches by two mounts has
//! two inodes. So a directory that is mounted at two paths, or in two containers of a pod, is one mount of the tree, and
//! all of them get its path.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, statx},
    mount::MountAttrFlags,
};

use super::{FileServer, ShareError, apply_options, detached::clone_mount_of, error::attach_error, run_in_thread};
use crate::{
    jail::{FailedStep, step, syscalls::clear_mount_attributes},
    oci::{ReadOnly, Share, ShareIdMap, lists_mount_below},
};

/// The directory of the places. It cannot be the id of a container, which begins with a letter or digit.
const DIRECTORY: &str = ".shared";

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): the id of a mount that is never used again. Older kernels ignore the flag, and
/// return ids that are used again after an unmount.
const UNIQUE_MOUNT_ID: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The places of a pod.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The number of the next place. Numbers are not used again: the guest may still know the former files.
    next: u64,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    path: String,
    source: SourceId,
    /// Mounts below the source are shared too.
    recursive: bool,
    id_map: Option<ShareIdMap>,
    /// The guest can write.
    writable: bool,
    /// The [`Share::path`]s of those who use it.
    users: Vec<String>,
}

/// What a path of the host leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SourceId {
    /// The id of the mount: other mounts of the same directory can have other options and other mounts below them.
    mount: u64,
    /// The major and minor number of the file system.
    device: (u32, u32),
    inode: u64,
}

impl Places {
    /// Removes the users at `path` and below it. Returns the paths of the places that nobody uses any more.
    pub(super) fn leave(&mut self, path: &Path) -> Vec<PathBuf> {
        for place in &mut self.places {
            place.users.retain(|user| !Path::new(user).starts_with(path));
        }
        let unused = self.places.extract_if(.., |place| place.users.is_empty());
        unused.map(|place| PathBuf::from(place.path)).collect()
    }
}

impl FileServer {
    /// Shares a directory or a file of the host for a container of a pod. Returns its path in the tree, which is that of
    /// an earlier share if that has the same source. To detach it, use the share's own path.
    pub(crate) fn attach_in_pod(&self, share: &Share) -> Result<String, ShareError> {
        run_in_thread(|| {
            self.find_or_make_place(share)
                .map_err(attach_error(&share.source, &share.path))
        })
    }

    fn find_or_make_place(&self, share: &Share) -> Result<String, FailedStep> {
        // What a file system can delay comes before the lock, for which other containers wait.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let source = rustix::fs::openat(CWD, &share.source, flags, Mode::empty()).map_err(step("open it"))?;
        let id = source_id(source.as_fd()).map_err(step("read its inode number"))?;
        let mount = clone_mount_of(source.as_fd(), share.recursive).map_err(step("copy its mount"))?;
        apply_options(mount.as_fd(), share)?;

        let mut places = self.places.lock();
        let writable = share.read_only == ReadOnly::None;
        for place in &mut places.places {
            if place.source == id
                && place.id_map == share.id_map
                && !self
                    .has_mounts_below(share, source.as_fd(), place)
                    .map_err(step("look for mounts below it"))?
            {
                if writable && !place.writable {
                    self.make_writable(Path::new(&place.path))
                        .map_err(step("make it writable"))?;
                    place.writable = true;
                }
                place.users.push(share.path.clone());
                return Ok(place.path.clone());
            }
        }
        let path = format!("{DIRECTORY}/{}", places.next);
        places.next += 1;
        if let Err(error) = self.attach_detached(&mount, &path, false) {
            if let Err(error) = self.remove(Path::new(&path)) {
                log::warn!("cannot remove {path} from the tree of shared files: {error}");
            }
            return Err(error);
        }
        places.places.push(Place {
            path: path.clone(),
            source: id,
            recursive: share.recursive,
            id_map: share.id_map.clone(),
            writable,
            users: vec![share.path.clone()],
        });
        Ok(path)
    }

    /// Whether there are mounts below the source of `share`, which is opened as `source`, or below `place`: they can
    /// differ, because mounts that the host made after the place appear only in the source.
    fn has_mounts_below(&self, share: &Share, source: BorrowedFd<'_>, place: &Place) -> io::Result<bool> {
        if share.recursive {
            let path = std::fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
            if lists_mount_below(&std::fs::read("/proc/thread-self/mountinfo")?, &path) {
                return Ok(true);
            }
        }
        if place.recursive {
            let table = std::fs::read(format!("/proc/{}/mountinfo", self.child.id()))?;
            return Ok(lists_mount_below(&table, &Path::new("/").join(&place.path)));
        }
        Ok(false)
    }

    /// Removes the restriction of a mount of the tree to reading. Leaves the calling thread in the file server's mount
    /// namespace.
    fn make_writable(&self, path: &Path) -> io::Result<()> {
        self.enter()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mount = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)?;
        clear_mount_attributes(mount.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY)
    }
}

fn source_id(source: BorrowedFd<'_>) -> io::Result<SourceId> {
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID | UNIQUE_MOUNT_ID;
    let status = statx(source, "", AtFlags::EMPTY_PATH, wanted)?;
    Ok(SourceId {
        mount: status.stx_mnt_id,
        device: (status.stx_dev_major, status.stx_dev_minor),
        inode: status.stx_ino,
    })
}
