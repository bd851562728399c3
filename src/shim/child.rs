//! A child process with a pidfd: it can be awaited without a signal handler, and signalled without a race.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

/// How long a killed child may take to end. A file system of this host can keep it in an uninterruptible call.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A child of this process. Its pid is not reused before it is reaped. Dropping it kills the child, and reaps it when
/// it has ended.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    descriptor: Arc<AsyncFd<OwnedFd>>,
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
        Ok(Self {
            pid,
            descriptor: Arc::new(descriptor),
        })
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
        wait(&self.descriptor).await
    }

    /// Waits until the child has ended, and frees its pid. May be called once.
    pub(crate) async fn reap(&self) -> io::Result<WaitStatus> {
        let ended = self.wait().await?;
        poll(&self.descriptor, WaitIdOptions::empty())?;
        Ok(ended)
    }

    /// Kills the child and frees its pid. A child that does not end within [`END_LIMIT`] is reaped in the background.
    /// `name` names it in the log.
    pub(crate) async fn end(self, name: &str) {
        self.kill();
        match tokio::time::timeout(END_LIMIT, self.reap()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => log::warn!("cannot reap {name}, process {}: {error}", self.pid()),
            Err(_) => log::warn!(
                "{name}, process {}, does not end after SIGKILL: a file system of this host hangs",
                self.pid()
            ),
        }
    }

    /// Kills the child, blocks this thread until it has ended, and frees its pid. Only for a child that makes no system
    /// call that a file system can delay.
    pub(crate) fn kill_and_reap(&self) {
        self.kill();
        // Fails only if the child is already reaped.
        let _ = rustix::process::waitid(WaitId::PidFd(self.descriptor.get_ref().as_fd()), WaitIdOptions::EXITED);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // An error means that it is already reaped.
        if let (Ok(None), Ok(runtime)) = (poll(&self.descriptor, WaitIdOptions::empty()), Handle::try_current()) {
            let descriptor = self.descriptor.clone();
            runtime.spawn(async move {
                if wait(&descriptor).await.is_ok() {
                    // Fails only if the child is already reaped.
                    let _ = poll(&descriptor, WaitIdOptions::empty());
                }
            });
        }
    }
}

/// [`Child::wait`] for a pidfd.
async fn wait(pidfd: &AsyncFd<OwnedFd>) -> io::Result<WaitStatus> {
    loop {
        let mut ready = pidfd.readable().await?;
        if let Some(ended) = poll(pidfd, WaitIdOptions::NOWAIT)? {
            return Ok(ended);
        }
        ready.clear_ready();
    }
}

/// The status of the child if it has ended. Reaps it, unless `options` has `NOWAIT`.
fn poll(pidfd: &AsyncFd<OwnedFd>, options: WaitIdOptions) -> io::Result<Option<WaitStatus>> {
    let status = rustix::process::waitid(
        WaitId::PidFd(pidfd.get_ref().as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG | options,
    )?;
    Ok(status.map(|status| wait_status(&status)))
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

    use nutshell_fixtures::HungVolume;

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

    #[tokio::test]
    async fn dropped_child_is_reaped() {
        for program in ["sleep", "true"] {
            let child = child(program, &["1000"]);
            let proc = format!("/proc/{}", child.pid());
            let pidfd = child.descriptor.clone();

            drop(child);

            wait_until_reaped(&pidfd).await;
            assert!(!std::fs::exists(&proc).unwrap(), "{program}");
        }
    }

    #[tokio::test]
    async fn ended_child_is_reaped() {
        let child = child("sleep", &["1000"]);
        let proc = format!("/proc/{}", child.pid());
        child.end("the sleeper").await;
        assert!(!std::fs::exists(&proc).unwrap());
    }

    #[tokio::test]
    async fn child_that_waits_for_a_hung_file_system_is_reaped_when_it_ends() {
        let volume = HungVolume::mount_temporary();
        let file = volume.path().join("file").display().to_string();
        let child = child("cat", &[&file]);
        volume.wait_for_request();
        let (proc, pidfd) = (format!("/proc/{}", child.pid()), child.descriptor.clone());

        tokio::time::pause();
        child.end("the reader").await;
        tokio::time::resume();

        assert!(std::fs::exists(&proc).unwrap());
        drop(volume);
        wait_until_reaped(&pidfd).await;
        assert!(!std::fs::exists(&proc).unwrap());
    }

    /// Waits until the child is gone from the table of processes: its pidfd has nothing to wait for then.
    async fn wait_until_reaped(pidfd: &AsyncFd<OwnedFd>) {
        let reaped = async {
            while poll(pidfd, WaitIdOptions::NOWAIT).is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reaped).await.unwrap();
    }
}
