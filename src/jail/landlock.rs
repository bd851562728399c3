//! Landlock rules (landlock(7)): a limit that the kernel keeps even if a mount or a descriptor gives the process more
//! than was meant.

use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};

/// What a process may open. In each case it reaches no abstract socket and signals no process outside of the jail, if
/// the kernel has these scopes (ABI 6, Linux 6.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpenAccess {
    /// No path, not even beneath a directory of which it has a descriptor, and no TCP port.
    Nothing,
    /// Everything in its root. The mount namespace is the limit: it has nothing but the tree. Rules for paths would
    /// have the kernel walk from each file to the root at each open, and refuse files of a tree that has been detached.
    Root,
}

/// The newest version of Landlock whose rules are used. An older kernel enforces those that it knows.
const VERSION: ABI = ABI::V6;

/// Limits the calling thread and those that it starts later. No-op on a kernel without Landlock: it is one more limit
/// besides the empty root, the namespaces and the list of system calls. `check` reports such a kernel.
pub(super) fn restrict(access: OpenAccess) -> io::Result<()> {
    let ruleset = Ruleset::default();
    let ruleset = match access {
        OpenAccess::Nothing => ruleset
            .handle_access(AccessFs::from_all(VERSION))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(VERSION))),
        OpenAccess::Root => Ok(ruleset),
    };
    ruleset
        .and_then(|ruleset| ruleset.scope(Scope::from_all(VERSION)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map(drop)
        .map_err(|error: RulesetError| io::Error::other(error))
}
