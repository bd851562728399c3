//! Id-mapped mounts (mount_setattr(2), `MOUNT_ATTR_IDMAP`): user and group ids of files are translated when they are
//! read from disk, and back when they are written.

use std::{
    fs::{self, File},
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::process::{Pid, Signal, WaitOptions};

use crate::{
    jail::syscalls::{fork_into_user_namespace, map_ids},
    oci::IdMap,
};

/// The step that fails if the file system does not support it. The kernel's error is only "invalid argument".
pub(super) const ID_MAP_STEP: &str = "map its ids (its file system must support ID-mapped mounts)";

/// Maps the ids of the detached `mount`, and of the mounts below it if `recursive`.
pub(super) fn apply(mount: BorrowedFd<'_>, map: &IdMap, recursive: bool) -> io::Result<()> {
    map_ids(mount, &user_namespace(map)?, recursive)
}

/// A user namespace with the mapping, because the kernel takes mappings only in this form. The process is needed only
/// to create it.
fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let process = NamespaceProcess(fork_into_user_namespace()?);
    let pid = process.0.as_raw_nonzero();
    fs::write(format!("/proc/{pid}/uid_map"), map.uids.to_string())?;
    fs::write(format!("/proc/{pid}/gid_map"), map.gids.to_string())?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// The process that holds a new user namespace. It is killed and reaped on drop.
struct NamespaceProcess(Pid);

impl Drop for NamespaceProcess {
    fn drop(&mut self) {
        // Neither call can fail for a child that was not reaped.
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.0), WaitOptions::empty());
    }
}
