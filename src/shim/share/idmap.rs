//! Id-mapped mounts (mount_setattr(2), `MOUNT_ATTR_IDMAP`): the ids of a tree's files as they are on
//! disk are others where the tree is looked at, and back again for what is written.

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

/// What fails where a file system cannot do it.
pub(super) const STEP: &str = "map its ids, which its file system must be able to";

/// Maps the ids of the detached `mount`, and of those below it if `recursive`.
pub(super) fn apply(mount: BorrowedFd<'_>, map: &IdMap, recursive: bool) -> io::Result<()> {
    map_ids(mount, &user_namespace(map)?, recursive)
}

/// A user namespace is the form in which the kernel takes a mapping. It needs a process only while it
/// is made.
fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let process = Sleeper(fork_into_user_namespace()?);
    let pid = process.0.as_raw_nonzero();
    fs::write(format!("/proc/{pid}/uid_map"), map.uids.to_string())?;
    fs::write(format!("/proc/{pid}/gid_map"), map.gids.to_string())?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// A process that ends with this value.
struct Sleeper(Pid);

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Neither can fail for a child that nobody else waits for.
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.0), WaitOptions::empty());
    }
}
