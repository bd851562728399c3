//! Lists of the system calls that a jailed process and each of its threads may make (seccomp(2)).
//!
//! A process first installs the list of its role, which all its threads inherit, and then each thread installs a list
//! of its own. A call must be on both. A call that is not on a list ends the process with a message that names role,
//! thread and call ([`violation`]).
//!
//! Belongs here: the form of a list, its translation to a filter, and the calls that every Rust thread makes
//! ([`runtime`]). Does not belong here: the lists, which are beside the code that needs the calls. `jail::enter` and
//! each thread that starts call this module.

mod call;
mod filter;
pub(crate) mod runtime;
#[cfg(test)]
pub(crate) mod testing;
mod violation;

use std::{
    io, process,
    sync::atomic::{AtomicBool, Ordering},
};

pub(crate) use self::{
    call::{AllowedCall, Arguments, Call, CallList, Refusal, allowed, refused},
    filter::compile,
};
use super::syscalls;

/// Whether this process has the list of its role. In other processes, such as unit tests, threads install no list.
static IS_CONFINED: AtomicBool = AtomicBool::new(false);

/// Limits the calling process, which has one thread, to `list` from now on. `role` names it in messages.
///
/// # Errors
///
/// The kernel has no seccomp filters, or refuses this one.
pub(super) fn confine_process(role: &'static str, list: &CallList) -> io::Result<()> {
    violation::report_violations(role)?;
    install(list)?;
    IS_CONFINED.store(true, Ordering::Release);
    Ok(())
}

/// Limits the calling thread to `list`, which must be part of the list of its process. No-op in a process that is not
/// jailed. If the kernel refuses it, the process ends: the thread must not serve a guest without its limits.
pub(crate) fn confine_thread(list: &CallList) {
    if IS_CONFINED.load(Ordering::Acquire)
        && let Err(error) = install(list)
    {
        eprintln!("cannot limit the system calls of thread {:?}: {error}", list.thread);
        process::abort();
    }
}

/// Whether the calling thread is limited to `list`. Threads that it starts inherit that.
pub(crate) fn is_confined_to(list: &CallList) -> bool {
    violation::thread_name() == list.thread
}

/// Like [`confine_thread`], for a thread whose starter may be limited to the same list: `is_inherited` is the result of
/// [`is_confined_to`] there. An inherited list is not installed again, because the kernel applies each of them to each
/// call, and limits their total length (`MAX_INSNS_PER_PATH` in kernel/seccomp.c).
pub(crate) fn confine_started_thread(list: &CallList, is_inherited: bool) {
    if is_inherited {
        violation::set_thread_name(list.thread);
    } else {
        confine_thread(list);
    }
}

fn install(list: &CallList) -> io::Result<()> {
    let program = filter::compile(list).map_err(io::Error::other)?;
    violation::set_thread_name(list.thread);
    syscalls::install_seccomp_filter(&program)
}
