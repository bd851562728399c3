//! Reaps every child, and never loses how one of ours ended.

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
    /// 0–255; 128 + n for a process killed by signal n.
    pub(crate) status: u8,
    /// The signal that killed it.
    pub(crate) signal: Option<u32>,
    /// Nanoseconds since the epoch.
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

/// Waits for children.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: OwnedFd,
    /// Ends of processes that nobody has claimed: a process can end before the job that made it says
    /// so. Kept while a job is on its way.
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

    /// Everything that has ended since the last call.
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

    /// Remembers the end of a process that may still be claimed.
    pub(crate) fn keep_unclaimed(&mut self, pid: Pid, exit: ProcessExit) {
        self.unclaimed.insert(pid, exit);
    }

    /// How `pid`, which a job has just named, ended; `None` if it lives.
    pub(crate) fn claim(&mut self, pid: Pid) -> Option<ProcessExit> {
        let exit = self.unclaimed.remove(&pid)?;
        // The number may have been used again by now: a living child is the one that is meant.
        let lives = rustix::process::waitid(
            rustix::process::WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
        )
        .is_ok();
        (!lives).then_some(exit)
    }

    /// Forgets what nobody can claim any more.
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
        // The pid was reaped behind its back: this only clears its state.
        let _ = child.try_wait();
        ProcessExit::now(status)
    }

    #[test]
    fn status_follows_the_shells_convention() {
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
