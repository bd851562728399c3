//! Signals to the processes of a container.

use std::io;

use crate::cgroup::Cgroup;
use crate::sys;

/// The last real-time signal (signal(7)).
pub(super) const LAST_SIGNAL: u32 = 64;

pub(super) const KILL: u32 = libc::SIGKILL.unsigned_abs();

/// Whether the default action of a signal terminates the process (signal(7)).
pub(super) fn terminates_by_default(signal: u32) -> bool {
    const OTHERS: [i32; 8] = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    signal != 0 && !OTHERS.iter().any(|other| other.unsigned_abs() == signal)
}

/// Signals every process of a cgroup. Returns `false` if there is none.
pub(super) fn signal_all(cgroup: &Cgroup, signal: u32) -> io::Result<bool> {
    let processes = cgroup.processes();
    if signal == KILL && (processes.is_truncated || !processes.pids.is_empty()) {
        // This also kills processes that are forked in the meantime.
        cgroup.kill()?;
        return Ok(true);
    }
    if processes.is_truncated {
        return Err(io::Error::other("it has too many cgroups or processes"));
    }
    for pid in &processes.pids {
        match sys::kill(*pid, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
            _ => {}
        }
    }
    Ok(!processes.pids.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_terminate_by_default_are_recognized() {
        for (signal, expected) in [
            (15, true),
            (9, true),
            (1, true),
            (34, true),
            (17, false),
            (19, false),
            (0, false),
        ] {
            assert_eq!(terminates_by_default(signal), expected, "signal {signal}");
        }
    }
}
