//! Confines the processes that serve a guest or read an image. The roles `vmm`, `fs` and `disk-inspector` call
//! [`enter`] first, while they have one thread and have read nothing that a guest or the author of an image wrote.
//!
//! Belongs here: the start of such a process ([`RoleCommand`]), and the steps by which it gives up what it does not
//! need ([`enter`]). Does not belong here: what the child does afterwards. Called by the shim and
//! [`crate::disk`], which start the children, and by `main` of the children.

mod error;
mod landlock;
mod origin;
pub(crate) mod root;
pub(crate) mod seccomp;
mod spawn;
pub(crate) mod syscalls;
#[cfg(test)]
mod tests;

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::Mode,
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, Signal},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid},
};

pub(crate) use self::{
    error::{FailedStep, JailError, step},
    landlock::OpenAccess,
    origin::open_namespace_of_parent,
    spawn::RoleCommand,
};
use self::{origin::Origin, seccomp::CallList};

/// User and group id of a jailed process are this plus its pid in the shim's pid namespace. A pid belongs to one living
/// process, so no two living processes of a pid namespace share an id, and a compromised child can neither signal nor
/// trace the child of another pod. No account has these ids: systemd's list of id ranges (UIDS-GIDS.md) leaves
/// 0x7000_0000 to 0x7FFD_FFFF unused, and pids are below 2^22 (`PID_MAX_LIMIT`).
const FIRST_ID: u32 = 0x7000_0000;

/// The privileges and resources that a jailed process keeps.
#[derive(Debug)]
pub(crate) struct Jail<'a> {
    /// Names the process in errors.
    pub(crate) role: &'static str,
    /// The process's name in `ps` and `top`, at most 15 bytes.
    pub(crate) name: &'static CStr,
    pub(crate) root: Root<'a>,
    /// A pidfd of a jailed process, whose namespaces for network, IPC and host name this one enters. They are empty, so
    /// nothing is shared, and making and removing namespaces is a large part of the time to start a container. New ones
    /// are made if that process has ended or is not in its jail yet.
    pub(crate) peer: Option<BorrowedFd<'a>>,
    /// What it may open, besides what it has open.
    pub(crate) open_access: OpenAccess,
    /// Permitted and effective. The inheritable, ambient and bounding sets are empty.
    pub(crate) capabilities: CapabilitySet,
    /// Descriptors that stay open, besides 0, 1, 2 and `peer`.
    pub(crate) keep: &'a [BorrowedFd<'a>],
    /// The limit of descriptors (`RLIMIT_NOFILE`). It is lower if the shim's own limit is lower and the shim may not
    /// raise it.
    pub(crate) max_descriptors: u32,
    /// Initial size of the kernel's descriptor table. If the table of a process with several threads grows, the caller
    /// waits for an RCU grace period, in the middle of a guest's request.
    pub(crate) descriptor_table_size: u32,
    /// The limit of threads (`RLIMIT_NPROC`).
    pub(crate) max_threads: u32,
    /// The system calls of the process. `None` allows all, which only tests of the other limits do.
    pub(crate) calls: Option<CallList>,
}

/// The root directory of a jailed process.
#[derive(Debug)]
pub(crate) enum Root<'a> {
    /// An empty read-only directory.
    Empty,
    /// This mount namespace (a descriptor of it) is entered. The process reaches its mounts through its working
    /// directory, which is the namespace's root. Its root directory is a copy of only the mount at that root, so it has
    /// none of the mounts below.
    Namespace(BorrowedFd<'a>),
}

/// Gives up everything that `jail` does not list, and closes all other descriptors. Call it once, before anything else,
/// as root, with one thread, in a process that [`RoleCommand`] started.
///
/// Afterwards the process has unused ids, no access to another file system, network, IPC, host name or process, cannot
/// gain privileges by exec, leaves no core dump, and dies with its parent.
pub(crate) fn enter(jail: &Jail<'_>) -> Result<(), JailError> {
    let parent = origin::parent_from_arguments()?;
    // Best effort: the name is only for lists of the host's processes.
    let _ = rustix::thread::set_name(jail.name);
    // The shim disables transparent huge pages for itself, and its children inherit that. Guest memory may have them.
    let _ = rustix::thread::disable_transparent_huge_pages(false);

    let failed = |(step, source)| JailError::Step {
        role: jail.role,
        step,
        source,
    };
    let origin = Origin::open().map_err(step("open /proc/self/stat")).map_err(failed)?;
    let confine = || -> Result<(), FailedStep> {
        let id = FIRST_ID + origin.pid().map_err(step("read its process id"))?;
        let kept = jail.keep.iter().copied().chain(jail.peer).chain([origin.as_fd()]);
        close_all_except(kept).map_err(step("close inherited descriptors"))?;
        set_limits(jail).map_err(step("set resource limits"))?;
        grow_descriptor_table(jail.descriptor_table_size).map_err(step("grow the descriptor table"))?;
        isolate(jail)?;
        drop_privileges(id, jail.capabilities)?;
        landlock::restrict(jail.open_access).map_err(step("apply Landlock rules"))?;
        die_with_parent()
    };
    confine().map_err(failed)?;
    // If the parent is still the shim, the signal of its end cannot have been missed.
    if origin.parent_pid().map_err(step("read its parent")).map_err(failed)? != parent {
        return Err(JailError::Orphaned);
    }
    drop(origin);
    // The last step: the list has none of the calls of the steps before.
    match &jail.calls {
        None => Ok(()),
        Some(calls) => seccomp::confine_process(jail.role, calls)
            .map_err(step("limit its system calls"))
            .map_err(failed),
    }
}

fn close_all_except<'a>(kept: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<()> {
    let mut kept: Vec<RawFd> = kept
        .map(|descriptor| descriptor.as_raw_fd())
        .filter(|fd| *fd > 2)
        .collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if first < fd {
            syscalls::close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    syscalls::close_range(first, RawFd::MAX)
}

fn set_limits(jail: &Jail<'_>) -> io::Result<()> {
    for (resource, limit) in [
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Nofile, jail.max_descriptors),
        (Resource::Nproc, jail.max_threads),
        (Resource::Rtprio, 0),
    ] {
        let limit = u64::from(limit);
        let both = |limit| Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        match (
            rustix::process::setrlimit(resource, both(limit)),
            rustix::process::getrlimit(resource).maximum,
        ) {
            // Only root with CAP_SYS_RESOURCE may raise a limit.
            (Err(Errno::PERM), Some(before)) => rustix::process::setrlimit(resource, both(limit.min(before)))?,
            (set, _) => set?,
        }
    }
    Ok(())
}

fn grow_descriptor_table(size: u32) -> io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let size = limit.unwrap_or(u64::MAX).min(u64::from(size));
    let last = RawFd::try_from(size.saturating_sub(1)).map_err(io::Error::other)?;
    drop(rustix::io::fcntl_dupfd_cloexec(io::stdin(), last)?);
    Ok(())
}

/// The namespaces that one process may share with another.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Enters the [`NAMESPACES`] of the process `peer`. Returns whether they differ from those before.
fn enter_namespaces_of(peer: BorrowedFd<'_>) -> bool {
    let network = || rustix::fs::stat("/proc/self/ns/net").map(|status| status.st_ino);
    let Ok(before) = network() else { return false };
    // All three or none (setns(2), with a pidfd).
    setns(peer, NAMESPACES).is_ok() && network().is_ok_and(|after| after != before)
}

fn isolate(jail: &Jail<'_>) -> Result<(), FailedStep> {
    if !jail.peer.is_some_and(enter_namespaces_of) {
        unshare(NAMESPACES).map_err(step("unshare network, IPC and host name"))?;
    }
    match jail.root {
        Root::Empty => {
            unshare(CloneFlags::CLONE_NEWNS).map_err(step("unshare mounts"))?;
            root::pivot_into_empty(root::Access::ReadOnly)?;
        }
        Root::Namespace(namespace) => {
            setns(namespace, CloneFlags::CLONE_NEWNS).map_err(step("enter the mount namespace"))?;
        }
    }
    root::leave_namespace_root()?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    Ok(())
}

/// Changes to the user and group `id`, and drops all capabilities except `kept`.
fn drop_privileges(id: u32, kept: CapabilitySet) -> Result<(), FailedStep> {
    // Changing the bounding set and the securebits needs CAP_SETPCAP, so it comes before the other sets.
    clear_bounding_set().map_err(step("clear the bounding set"))?;
    // Capabilities then depend only on the sets and not on user ids: uid 0 gains none, and a change of the user loses
    // none (capabilities(7)).
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(step("lock the securebits"))?;
    rustix::thread::clear_ambient_capability_set().map_err(step("clear the ambient set"))?;

    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&[]).map_err(step("drop supplementary groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(step("change the group"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(step("change the user"))?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
    .map_err(step("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid core dumps"))
}

fn clear_bounding_set() -> io::Result<()> {
    for bit in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // This kernel has no capability of this number.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Has the kernel kill this process when the shim ends. Call it after all changes of credentials, which clear the
/// signal (prctl(2)).
fn die_with_parent() -> Result<(), FailedStep> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("die with the shim"))
}
