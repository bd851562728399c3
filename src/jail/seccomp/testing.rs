//! Executes single system calls under a list, for tests.

use std::{io, sync::atomic::Ordering};

use nix::{
    sys::{
        signal::{SigHandler, Signal, signal},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};

use vm_memory::{MmapRegion, VolatileMemory};

use super::{CallList, IS_CONFINED, filter, violation};
use crate::jail::syscalls;

/// Makes [`super::confine_thread`] effective in this process, although the process itself has no list.
pub(crate) fn enable_thread_lists() {
    rustix::thread::set_no_new_privs(true).unwrap();
    violation::report_violations("the unit tests").unwrap();
    IS_CONFINED.store(true, Ordering::Release);
}

/// Limits the calling thread to `list`.
pub(crate) fn limit_thread(list: &CallList) {
    super::install(list).unwrap();
}

/// The outcome of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// SIGSYS has ended the process.
    Forbidden,
    /// It failed with this error.
    Failed(i32),
    /// It succeeded, did not return, or ended the process.
    Allowed,
}

/// What the child writes before it ends: it cannot always use its exit status, because a list may forbid exit_group.
mod report {
    pub(super) const NOTHING: i32 = -1;
    pub(super) const NO_FILTER: i32 = -2;
    pub(super) const SUCCEEDED: i32 = 0;
}

/// Makes the call `number` in a child process that is limited to `list`.
pub(crate) fn outcome_of(list: &CallList, number: libc::c_long, arguments: [u64; 6]) -> Outcome {
    let program = filter::compile(list).unwrap();
    // The region keeps its address in the child.
    let shared: MmapRegion<()> = MmapRegion::build(
        None,
        4096,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    )
    .unwrap();
    let slice = shared.as_volatile_slice();
    let report = slice.get_ref::<i32>(0).unwrap();
    report.store(report::NOTHING);
    // SAFETY: the child makes only system calls, and ends without running code of the test harness.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            let _ = rustix::thread::set_no_new_privs(true);
            // The child may have inherited the handler that reports violations. With the default action, SIGSYS ends
            // the child, and its wait status says so.
            // SAFETY: this is the default action, and no handler.
            let _ = unsafe { signal(Signal::SIGSYS, SigHandler::SigDfl) };
            // No core dump.
            let _ = rustix::process::setrlimit(
                rustix::process::Resource::Core,
                rustix::process::Rlimit {
                    current: Some(0),
                    maximum: Some(0),
                },
            );
            report.store(match syscalls::install_seccomp_filter(&program) {
                Err(_) => report::NO_FILTER,
                Ok(()) => {
                    let [a, b, c, d, e, f] = arguments;
                    // SAFETY: whatever the call does, it does to this child alone, which ends.
                    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
                        -1 => io::Error::last_os_error().raw_os_error().unwrap_or(i32::MAX),
                        _ => report::SUCCEEDED,
                    }
                }
            });
            // SAFETY: ends the child at once: the kernel kills it if the list forbids this call.
            unsafe { libc::syscall(libc::SYS_exit_group, 0) };
            unreachable!("exit_group does not return");
        }
    };
    let ended = waitpid(child, None).unwrap();
    match report.load() {
        report::NOTHING if matches!(ended, WaitStatus::Signaled(_, Signal::SIGSYS, _)) => Outcome::Forbidden,
        // The call did not return, or it returned without an error.
        report::NOTHING | report::SUCCEEDED => Outcome::Allowed,
        report::NO_FILTER => panic!("the filter cannot be installed"),
        errno => Outcome::Failed(errno),
    }
}
