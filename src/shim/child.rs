//! A child process with a pidfd: it can be awaited without a signal handler, and signalled without a race.

use std::{io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::io::{Interest, unix::AsyncFd};

/// A child of this process. Its pid is not reused before [`Self::reap`]. Dropping it earlier kills the child, which
/// then stays a zombie until this process exits.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    descriptor: AsyncFd<OwnedFd>,
}

/// The wait status of a child that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitStatus {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl Child {
    /// Takes over the child `pid`. Nothing else may wait for it.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(crate) fn new(pid: Pid) -> io::Result<Self> {
        let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as it is owned, and
        // `AsyncFd` owns it from here on.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { pid, descriptor })
    }

    /// Takes over a child that `std` spawned. See [`Self::new`].
    pub(crate) fn from_std(child: &std::process::Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Self::new(pid.ok_or(io::ErrorKind::InvalidInput)?)
    }

    /// A duplicate of its pidfd.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(crate) fn try_clone_descriptor(&self) -> io::Result<OwnedFd> {
        self.descriptor.get_ref().try_clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal. No-op for a child that has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        // The only possible error for the pidfd of a child is ESRCH: the child has ended.
        let _ = rustix::process::pidfd_send_signal(self.descriptor.get_ref(), signal);
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Waits until the child has ended, and leaves it a zombie, so that its pid is not reused yet.
    pub(crate) async fn wait(&self) -> io::Result<WaitStatus> {
        loop {
            let mut ready = self.descriptor.readable().await?;
            if let Some(ended) = self.poll(WaitIdOptions::NOWAIT)? {
                return Ok(ended);
            }
            ready.clear_ready();
        }
    }

    /// Waits until the child has ended, and frees its pid. May be called once.
    pub(crate) async fn reap(&self) -> io::Result<WaitStatus> {
        let ended = self.wait().await?;
        self.poll(WaitIdOptions::empty())?;
        Ok(ended)
    }

    /// Kills the child, blocks this thread until it has ended, and frees its pid. Only for children that end promptly
    /// after SIGKILL.
    pub(crate) fn kill_and_reap(&self) {
        self.kill();
        // Fails only if the child is already reaped.
        let _ = rustix::process::waitid(WaitId::PidFd(self.fd()), WaitIdOptions::EXITED);
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.descriptor.get_ref().as_fd()
    }

    fn poll(&self, options: WaitIdOptions) -> io::Result<Option<WaitStatus>> {
        let status = rustix::process::waitid(
            WaitId::PidFd(self.fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG | options,
        )?;
        Ok(status.map(|status| wait_status(&status)))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

fn wait_status(status: &WaitIdStatus) -> WaitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => WaitStatus::Exited(code),
        (None, signal) => WaitStatus::Killed(signal.unwrap_or_default()),
    }
}

impl std::fmt::Display for WaitStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exited with status {code}"),
            Self::Killed(signal) => write!(formatter, "was killed by signal {signal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn child(program: &str, arguments: &[&str]) -> Child {
        Child::from_std(&Command::new(program).args(arguments).spawn().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn exit_status_and_signal_are_distinguished() {
        assert_eq!(
            child("sh", &["-c", "exit 3"]).reap().await.unwrap(),
            WaitStatus::Exited(3)
        );
        let sleeper = child("sleep", &["1000"]);
        sleeper.signal(Signal::TERM);
        assert_eq!(sleeper.reap().await.unwrap(), WaitStatus::Killed(15));
    }

    #[tokio::test]
    async fn pid_is_not_reused_before_the_child_is_reaped() {
        let child = child("true", &[]);
        let proc = format!("/proc/{}", child.pid());

        child.wait().await.unwrap();
        assert!(std::fs::exists(&proc).unwrap());

        child.reap().await.unwrap();
        assert!(!std::fs::exists(&proc).unwrap());
    }
}
