//! Confinement of the roles that serve a guest: what `vmm` and `fs` do first, while they have one
//! thread and have read nothing that a guest wrote.
//!
//! Lives here: how a child is started ([`build_command`]) and how it gives up everything it does not need
//! ([`enter`]). May not live here: what the child does afterwards. Called by the shim, which starts
//! the children, and by `main` of [`crate::vmm`] and [`crate::fs`].

pub(crate) mod root;
pub(crate) mod syscalls;
#[cfg(test)]
mod tests;

use std::{
    env,
    ffi::CStr,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{self, Command},
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::Mode,
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, Signal},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid},
};

/// Added to a jailed process's pid, gives its user and group id. A pid belongs to one living
/// process, so no two living processes of a pid namespace share an id: a child that was taken over
/// can neither signal nor trace another pod's. No account has these ids: systemd's list of id ranges
/// (UIDS-GIDS.md) leaves 0x7000_0000 to 0x7FFD_FFFF unused, and pids end at 2^22
/// (`PID_MAX_LIMIT`).
const FIRST_ID: u32 = 0x7000_0000;

/// Where a step of [`enter`] failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// The role was started by hand.
    #[error("this role is started by the shim only: use the executable as containerd's runtime")]
    NotStartedByShim,
    /// The shim ended before its child was ready; nothing is left to serve.
    #[error("the shim that started this process is gone")]
    Orphaned,
    /// The kernel refused.
    #[error("confine {role}: {step}: {source} (the shim must run as root of the host)")]
    Step {
        /// Which role.
        role: &'static str,
        /// What was refused.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What failed, and why.
pub(crate) type FailedStep = (&'static str, io::Error);

/// Names the step that an error happened in.
pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> FailedStep {
    move |error| (step, error.into())
}

/// What a role keeps.
#[derive(Debug)]
pub(crate) struct Jail<'a> {
    /// The role's name, for its errors.
    pub(crate) role: &'static str,
    /// The process's name in `ps` and `top`, at most 15 bytes.
    pub(crate) name: &'static CStr,
    /// The tree that it sees as `/`.
    pub(crate) root: Root<'a>,
    /// Stay permitted and effective; nothing is inheritable, ambient or in the bounding set.
    pub(crate) capabilities: CapabilitySet,
    /// Descriptors that stay open beside 0, 1 and 2.
    pub(crate) keep: &'a [BorrowedFd<'a>],
    /// The most descriptors that it may have; fewer where the shim may neither have nor allow as many.
    pub(crate) max_descriptors: u32,
    /// For how many descriptors the kernel's table is made at once: growing the table of a process
    /// with several threads waits for an RCU grace period, in the middle of a guest's request.
    pub(crate) descriptor_table_size: u32,
    /// The most threads that it may have.
    pub(crate) max_threads: u32,
}

/// What a jailed process sees as `/`.
#[derive(Debug)]
pub(crate) enum Root<'a> {
    /// An empty directory that nobody can write.
    Empty,
    /// The root of an existing mount namespace.
    Namespace(BorrowedFd<'a>),
}

/// The command that starts this executable again as `role`, which then calls [`enter`].
///
/// To be spawned from a thread that lives as long as the shim: the kernel kills the child when the
/// thread that started it ends (`PR_SET_PDEATHSIG`, prctl(2)).
pub(crate) fn build_command(role: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(format!("nutshell-{role}"))
        .arg(role)
        .arg(process::id().to_string())
        .env_clear();
    command
}

/// Gives up all that `jail` does not name. To be called once, first thing, as root, with one thread,
/// in a process that [`build_command`] started; descriptors that are not named are closed.
///
/// After it the process has ids of its own, no way to another file system, network, IPC or host
/// name, cannot gain privileges by any exec, leaves no core dump, and dies with its parent.
pub(crate) fn enter(jail: &Jail<'_>) -> Result<(), JailError> {
    let parent = parent_from_arguments()?;
    // Best effort: a name helps whoever looks at the host, and nothing depends on it.
    let _ = rustix::thread::set_name(jail.name);
    // The shim has switched them off for itself; the guest's memory may have them.
    let _ = rustix::thread::disable_transparent_huge_pages(false);

    let confine = || -> Result<(), FailedStep> {
        close_all_but(jail.keep).map_err(step("close inherited descriptors"))?;
        limit(jail).map_err(step("set resource limits"))?;
        grow_descriptor_table(jail.descriptor_table_size).map_err(step("grow the descriptor table"))?;
        isolate(jail)?;
        drop_privileges(jail.capabilities)?;
        // The place of Landlock (deny every path, scope signals and abstract sockets) and of the
        // seccomp list for all threads: nothing below needs a privilege.
        Ok(())
    };
    confine().map_err(|(step, source)| JailError::Step {
        role: jail.role,
        step,
        source,
    })?;
    die_with(parent, jail.role)
}

/// The pid of the shim, as [`build_command`] wrote it.
fn parent_from_arguments() -> Result<u32, JailError> {
    env::args_os()
        .nth(2)
        .and_then(|pid| pid.to_str()?.parse().ok())
        .ok_or(JailError::NotStartedByShim)
}

fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).filter(|fd| *fd > 2).collect();
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

fn limit(jail: &Jail<'_>) -> io::Result<()> {
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, jail.max_descriptors),
        (Resource::Nproc, jail.max_threads),
    ] {
        let both = |most| Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        let most = u64::from(most);
        match (
            rustix::process::setrlimit(resource, both(most)),
            rustix::process::getrlimit(resource).maximum,
        ) {
            // Not every root may raise a limit (CAP_SYS_RESOURCE).
            (Err(Errno::PERM), Some(before)) => rustix::process::setrlimit(resource, both(most.min(before)))?,
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

fn isolate(jail: &Jail<'_>) -> Result<(), FailedStep> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(step("unshare network, IPC and host name"))?;
    match jail.root {
        Root::Empty => {
            unshare(CloneFlags::CLONE_NEWNS).map_err(step("unshare mounts"))?;
            root::pivot_into_empty(root::Access::ReadOnly)?;
        }
        Root::Namespace(namespace) => {
            setns(namespace, CloneFlags::CLONE_NEWNS).map_err(step("enter the mount namespace"))?;
        }
    }
    rustix::process::umask(Mode::from_raw_mode(0o077));
    Ok(())
}

/// Leaves `kept` and no other capability, and an id of the process's own (see [`FIRST_ID`]).
fn drop_privileges(kept: CapabilitySet) -> Result<(), FailedStep> {
    // Bounding set and securebits need CAP_SETPCAP, so they come before the other sets.
    clear_bounding_set().map_err(step("clear the bounding set"))?;
    // Capabilities follow from the sets alone, not from user ids: whoever has uid 0 or takes it
    // gains nothing by it, and a change of user does not take away what was kept (capabilities(7)).
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

    let id = FIRST_ID + process::id();
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
            // The first number that this kernel has no capability for.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Has the kernel kill this process when the shim ends. Last, because a change of credentials
/// forgets the signal (prctl(2)); then a parent that is still the shim cannot have been missed.
fn die_with(parent: u32, role: &'static str) -> Result<(), JailError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| JailError::Step {
        role,
        step: "die with the shim",
        source: error.into(),
    })?;
    if std::os::unix::process::parent_id() == parent {
        Ok(())
    } else {
        Err(JailError::Orphaned)
    }
}
