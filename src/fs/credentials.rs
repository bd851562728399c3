//! The credentials with which the calling thread accesses files.
//!
//! No file belongs to the user and group of this process. For a request that creates a file, or whose permissions a
//! file system may check itself (NFS), the thread first sets its file system ids (credentials(7)) to those of the
//! request. They become the owner of new files and affect nothing but file access. The jail's securebits keep the
//! capabilities as they are when these ids change.

use std::{cell::Cell, io};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// The capabilities of the file server: access to files, and nothing else. The guest's kernel has already checked what
/// the process may do, so the file server may act as any of the guest's users, including root.
///
/// `DAC_READ_SEARCH` is left out, because with it files anywhere on a share's file system could be opened by handle,
/// also outside the share. `SYS_ADMIN` is left out too, so the guest cannot use `trusted.*` attributes.
pub(crate) const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    // Files of any user and any mode.
    .union(CapabilitySet::DAC_OVERRIDE)
    // chmod, utimes and extended attributes of any user's files.
    .union(CapabilitySet::FOWNER)
    // Without it, writes and chmod would clear set-id bits that the guest's kernel does not clear.
    .union(CapabilitySet::FSETID)
    // setfsuid and setfsgid: new files belong to the guest's user and group.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    // File capabilities (`security.capability`), which package installers set.
    .union(CapabilitySet::SETFCAP);

/// Not a valid id: setfsuid(2) refuses it, and a FUSE request contains it if its sender has no valid id.
const INVALID_ID: u32 = u32::MAX;

thread_local! {
    /// User and group that [`set_fs_ids`] has set.
    static FS_IDS: Cell<Option<(u32, u32)>> = const { Cell::new(None) };
}

/// Sets the file system ids of the calling thread. Makes no system call if it has them already, which is the usual
/// case.
pub(super) fn set_fs_ids(uid: u32, gid: u32) -> io::Result<()> {
    if FS_IDS.get() == Some((uid, gid)) {
        return Ok(());
    }
    if uid == INVALID_ID || gid == INVALID_ID {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    FS_IDS.set(None);
    setfsgid(Gid::from_raw(gid));
    setfsuid(Uid::from_raw(uid));
    // These calls return the previous id and never an error, so only a second call shows whether the first succeeded.
    if setfsgid(Gid::from_raw(gid)).as_raw() != gid || setfsuid(Uid::from_raw(uid)).as_raw() != uid {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    FS_IDS.set(Some((uid, gid)));
    Ok(())
}

/// While this value exists, the calling thread lacks `CAP_FSETID`, so the kernel clears the set-id bits of files that
/// the thread changes.
#[derive(Debug)]
pub(super) struct WithoutFsetid(());

impl WithoutFsetid {
    pub(super) fn enter() -> io::Result<Self> {
        set_effective(CAPABILITIES.difference(CapabilitySet::FSETID))?;
        Ok(Self(()))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        set_effective(CAPABILITIES).expect("permitted capabilities can be made effective");
    }
}

fn set_effective(effective: CapabilitySet) -> io::Result<()> {
    Ok(set_capabilities(
        None,
        CapabilitySets {
            effective,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        },
    )?)
}
