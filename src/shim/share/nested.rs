//! Shares inside of other shares, such as volumes at `/srv` and `/srv/data` of a virtual machine.
//!
//! The mount point of the inner one is in the outer volume, as with other OCI runtimes. Guests may write that volume at
//! the same time, so each part of the path is opened without following links, and below the part before it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat},
    io::Errno,
    mount::MoveMountFlags,
};

use super::{
    FileServer, ShareError, error::attach_inside_error, is_directory, parse_tree_path, prepare_share, run_in_thread,
};
use crate::{
    jail::{FailedStep, step},
    oci::Share,
};

/// Refuses links, and paths that leave the directory.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

impl FileServer {
    /// Shares directories and files of the host, which may be inside of each other, in any order.
    pub(crate) fn attach_all(&self, shares: &[Share]) -> Result<(), ShareError> {
        let mut shares: Vec<_> = shares.iter().collect();
        shares.sort_by_key(|share| Path::new(&share.path).components().count());
        for (index, share) in shares.iter().enumerate() {
            let is_outer =
                |outer: &&&Share| outer.path != share.path && Path::new(&share.path).starts_with(&outer.path);
            match shares[..index].iter().rfind(is_outer) {
                None => self.attach(share)?,
                Some(outer) => self.attach_inside(share, outer)?,
            }
        }
        Ok(())
    }

    /// Shares `share` inside of `outer`, which is shared already.
    fn attach_inside(&self, share: &Share, outer: &Share) -> Result<(), ShareError> {
        run_in_thread(|| {
            let attach = || {
                let mount = prepare_share(share)?;
                let is_directory = is_directory(fstat(&mount).map_err(step("read its type"))?);
                let outer_path = parse_tree_path(&outer.path).map_err(step("check its path"))?;
                let path = parse_tree_path(&share.path).map_err(step("check its path"))?;
                let inner = path.strip_prefix(&outer_path).map_err(|error| {
                    let step: FailedStep = ("check its path", io::Error::other(error));
                    step
                })?;
                self.enter().map_err(step("enter the file server's mount namespace"))?;
                let outer_root = rustix::fs::openat2(
                    &self.root,
                    &outer_path,
                    OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                    BENEATH,
                );
                let outer_root = outer_root.map_err(step("open the outer volume"))?;
                let mount_point = make_mount_point(outer_root, inner, is_directory)
                    .map_err(step("make its mount point in the outer volume"))?;
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
                rustix::mount::move_mount(&mount, "", &mount_point, "", flags).map_err(step("mount it"))
            };
            attach().map_err(attach_inside_error(&share.source, &share.path, &outer.path))
        })
    }
}

/// Opens `path` below `root`, after it has created the missing parts: directories, and as the last one a directory or
/// an empty file.
fn make_mount_point(root: OwnedFd, path: &Path, is_directory: bool) -> Result<OwnedFd, Errno> {
    let mut parts = path.components().peekable();
    let mut opened = root;
    while let Some(part) = parts.next() {
        let name = Path::new(part.as_os_str());
        let wants_directory = is_directory || parts.peek().is_some();
        let found = match open_part(&opened, name) {
            Err(Errno::NOENT) => {
                match wants_directory {
                    true => rustix::fs::mkdirat(&opened, name, Mode::from_raw_mode(0o755))?,
                    false => {
                        let mode = Mode::from_raw_mode(0o644);
                        rustix::fs::mknodat(&opened, name, FileType::RegularFile, mode, 0)?;
                    }
                }
                open_part(&opened, name)?
            }
            found => found?,
        };
        // A file cannot be mounted on a directory, nor a directory on a file.
        match (wants_directory, super::is_directory(fstat(&found)?)) {
            (true, false) => return Err(Errno::NOTDIR),
            (false, true) => return Err(Errno::ISDIR),
            _ => opened = found,
        }
    }
    Ok(opened)
}

fn open_part(directory: impl AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, name, flags, Mode::empty(), BENEATH)
}
