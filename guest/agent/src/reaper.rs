//! Reaps all children, and keeps the exit status of those that a job has yet to report.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use rustix::io::Errno;
use rustix::process::{Pid, WaitIdOptions, WaitOptions, WaitStatus};

use crate::sys;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessExit {
    /// The exit status, 0 to 255: 128 + n for a process that signal n killed.
    pub(crate) status: u8,
    /// The signal that killed the process.
    pub(crate) signal: Option<u32>,
    /// The time of the exit, in nanoseconds since the epoch.
    pub(crate) exited_at: u64,
}

impl ProcessExit {
    fn now(status: WaitStatus) -> Self {
        let signal = status
            .terminating_signal()
            .and_then(|signal| u32::try_from(signal).ok());
        let number = match signal {
            Some(signal) => 128 + signal,
            None => status.exit_status().unwrap_or(0).unsigned_abs(),
        };
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            status: u8::try_from(number & 0xff).unwrap_or(u8::MAX),
            signal,
            exited_at: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

/// Reaps children, which SIGCHLD announces.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: OwnedFd,
    /// Exits of unknown processes. A process may end before the job that created it has reported its pid, so these
    /// are kept as long as any job is running.
    unclaimed: HashMap<Pid, ProcessExit>,
}

impl Reaper {
    /// Blocks SIGCHLD for this process from now on.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            signals: sys::open_child_signals()?,
            unclaimed: HashMap::new(),
        })
    }

    /// Reaps the children that have ended since the last call.
    pub(crate) fn reap(&mut self) -> io::Result<Vec<(Pid, ProcessExit)>> {
        let mut record = [0; 128];
        while let Ok(1..) = rustix::io::read(&self.signals, &mut record) {}
        let mut ended = Vec::new();
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => ended.push((pid, ProcessExit::now(status))),
                Ok(None) | Err(Errno::CHILD) => return Ok(ended),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Keeps the exit of a process that a job may still report.
    pub(crate) fn keep_unclaimed(&mut self, pid: Pid, exit: ProcessExit) {
        self.unclaimed.insert(pid, exit);
    }

    /// Returns the exit of `pid`, which a job has just reported, or `None` if that process is alive.
    pub(crate) fn claim(&mut self, pid: Pid) -> Option<ProcessExit> {
        let exit = self.unclaimed.remove(&pid)?;
        // The kernel may have reused the pid. If it is the pid of a child that has not been reaped, the job reported
        // that child.
        let is_child = rustix::process::waitid(
            rustix::process::WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
        )
        .is_ok();
        (!is_child).then_some(exit)
    }

    /// Drops the kept exits. Call this when no job is running.
    pub(crate) fn forget_unclaimed(&mut self) {
        self.unclaimed.clear();
    }
}

impl AsFd for Reaper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_of(script: &str) -> ProcessExit {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", script])
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        // The process is reaped already; this only updates the state of `Child`.
        let _ = child.try_wait();
        ProcessExit::now(status)
    }

    #[test]
    fn status_of_a_killed_process_is_128_plus_the_signal() {
        for (script, status, signal) in [
            ("exit 0", 0, None),
            ("exit 200", 200, None),
            ("kill -KILL $$", 137, Some(9)),
            ("kill -TERM $$", 143, Some(15)),
        ] {
            let exit = exit_of(script);
            assert_eq!((exit.status, exit.signal), (status, signal), "{script}");
        }
    }
}
