//! A child process, held by a pidfd: waited for without a signal handler, signalled without a race.

use std::{io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::io::{Interest, unix::AsyncFd};

/// A child of this process. Its pid stays taken until [`Self::reap`]; one that is dropped before is
/// killed, and stays a zombie until this process ends.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    descriptor: AsyncFd<OwnedFd>,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitStatus {
    /// It returned this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl Child {
    /// Takes over the child `pid`, which nobody else waits for. Needs the runtime.
    pub(crate) fn new(pid: Pid) -> io::Result<Self> {
        let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as it is owned, and
        // `AsyncFd` owns it from here on.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { pid, descriptor })
    }

    /// Takes over what `std` spawned.
    pub(crate) fn from_std(child: &std::process::Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Self::new(pid.ok_or(io::ErrorKind::InvalidInput)?)
    }

    /// Its pid on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal; a child that has ended feels nothing.
    pub(crate) fn signal(&self, signal: Signal) {
        // The only failure left for a pidfd of one's own child is ESRCH: it has ended.
        let _ = rustix::process::pidfd_send_signal(self.descriptor.get_ref(), signal);
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Waits for its end and leaves it a zombie: its pid still names it.
    pub(crate) async fn wait(&self) -> io::Result<WaitStatus> {
        loop {
            let mut ready = self.descriptor.readable().await?;
            if let Some(ended) = self.poll(WaitIdOptions::NOWAIT)? {
                return Ok(ended);
            }
            ready.clear_ready();
        }
    }

    /// Waits for its end and frees its pid. To be called once.
    pub(crate) async fn reap(&self) -> io::Result<WaitStatus> {
        let ended = self.wait().await?;
        self.poll(WaitIdOptions::empty())?;
        Ok(ended)
    }

    /// Kills it, waits for its end on this thread and frees its pid: for children that end at once.
    pub(crate) fn kill_and_reap(&self) {
        self.kill();
        // Fails only where it was reaped before.
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
        Ok(status.map(|status| how(&status)))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

fn how(status: &WaitIdStatus) -> WaitStatus {
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
    async fn status_and_signal_are_told_apart() {
        assert_eq!(
            child("sh", &["-c", "exit 3"]).reap().await.unwrap(),
            WaitStatus::Exited(3)
        );
        let sleeper = child("sleep", &["1000"]);
        sleeper.signal(Signal::TERM);
        assert_eq!(sleeper.reap().await.unwrap(), WaitStatus::Killed(15));
    }

    #[tokio::test]
    async fn pid_is_taken_until_the_child_is_reaped() {
        let child = child("true", &[]);
        let proc = format!("/proc/{}", child.pid());

        child.wait().await.unwrap();
        assert!(std::fs::exists(&proc).unwrap());

        child.reap().await.unwrap();
        assert!(!std::fs::exists(&proc).unwrap());
    }
}
