//! As whom the calling thread acts on files.
//!
//! The process itself has ids that no file has. What a file's creation asks for are the thread's
//! file system ids (credentials(7)), which nothing but file access looks at; the jail's securebits
//! keep the capabilities as they are whatever these ids become.

use std::{cell::Cell, io};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::CAPABILITIES;

/// Not an id: what setfsuid(2) refuses, and what FUSE sends where it has none.
const NONE: u32 = u32::MAX;

thread_local! {
    static ACTING: Cell<Option<(u32, u32)>> = const { Cell::new(None) };
}

/// Has the calling thread act as user `uid` and group `gid` from now on. Free where it does already,
/// which is the rule.
pub(super) fn act_as(uid: u32, gid: u32) -> io::Result<()> {
    if ACTING.get() == Some((uid, gid)) {
        return Ok(());
    }
    if uid == NONE || gid == NONE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    ACTING.set(None);
    setfsgid(Gid::from_raw(gid));
    setfsuid(Uid::from_raw(uid));
    // These calls report the id before and never an error, so a second one tells.
    if setfsgid(Gid::from_raw(gid)).as_raw() != gid || setfsuid(Uid::from_raw(uid)).as_raw() != uid {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    ACTING.set(Some((uid, gid)));
    Ok(())
}

/// Until it is dropped, the kernel clears set-id bits of files that the calling thread changes.
#[derive(Debug)]
pub(super) struct ClearingSetId(());

impl ClearingSetId {
    pub(super) fn start() -> io::Result<Self> {
        set_effective(CAPABILITIES.difference(CapabilitySet::FSETID))?;
        Ok(Self(()))
    }
}

impl Drop for ClearingSetId {
    fn drop(&mut self) {
        set_effective(CAPABILITIES).expect("what is permitted can be made effective");
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
