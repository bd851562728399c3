//! Node ids as the guest sees them, and for how long the guest may cache names and attributes of a node.
//!
//! A node id of the guest is virtiofsd's id with the node's class in the two highest bits. virtiofsd counts its ids up
//! from 1 and never reaches these bits. A guest that sends an id with wrong bits affects only its own caches.

use std::{ffi::CStr, time::Duration};

use virtiofsd::filesystem::ROOT_ID;

/// The shim sets this bit in the mode of a container's directory in the tree, if only the guest changes the
/// container's root file system ([`ROOTFS`]).
pub(crate) const OWNED_BY_GUEST: u32 = libc::S_ISVTX;

/// The name of a container's root file system in the container's directory.
pub(super) const ROOTFS: &CStr = c"rootfs";

/// For how long the guest may cache names and attributes of files that the host may change. The start of a command in
/// the guest takes longer, so the command sees what its caller has changed before. Without any caching, each step of a
/// path would be a request.
pub(super) const SHARED_TTL: Duration = Duration::from_millis(50);

/// For how long the guest may cache names and attributes of files that only it changes.
pub(super) const OWNED_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Class of a root file system that only the guest changes, and of everything in it.
const OWNED: u64 = 1 << 63;

/// Class of a directory whose [`ROOTFS`] is of class [`OWNED`].
const HOLDS_OWNED: u64 = 1 << 62;

/// virtiofsd's id of the node.
pub(super) fn inner_id(node: u64) -> u64 {
    node & !(OWNED | HOLDS_OWNED)
}

/// Whether only the guest changes the node.
pub(super) fn is_owned(node: u64) -> bool {
    node & OWNED != 0
}

/// Adds the class to virtiofsd's id of the node `name` in the directory `parent`. `mode` is the node's, or 0 if the
/// name does not exist.
pub(super) fn with_class(inner: u64, parent: u64, name: &CStr, mode: u32) -> u64 {
    if is_owned(parent) || parent & HOLDS_OWNED != 0 && name == ROOTFS {
        inner | OWNED
    } else if parent == ROOT_ID && mode & OWNED_BY_GUEST != 0 {
        inner | HOLDS_OWNED
    } else {
        inner
    }
}

/// For how long the guest may cache name and attributes of the node.
pub(super) fn ttl(node: u64) -> Duration {
    if is_owned(node) { OWNED_TTL } else { SHARED_TTL }
}
