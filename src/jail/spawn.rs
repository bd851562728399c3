//! The start of a jailed process, from the shim's side.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use nix::sched::{CloneFlags, setns, unshare};

/// Starts this executable as a role, which then calls [`super::enter`]. The process gets no environment, and is the
/// init process of a pid namespace of its own: it sees no other process, and the kernel kills its descendants when it
/// ends.
#[derive(Debug)]
pub(crate) struct RoleCommand {
    command: Command,
}

impl RoleCommand {
    pub(crate) fn new(role: &str) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(format!("nutshell-{role}"))
            .arg(role)
            .arg(fs::read_link("/proc/self")?)
            .env_clear();
        Ok(Self { command })
    }

    pub(crate) fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn stdin(&mut self, descriptor: impl Into<Stdio>) -> &mut Self {
        self.command.stdin(descriptor);
        self
    }

    pub(crate) fn stdout(&mut self, descriptor: impl Into<Stdio>) -> &mut Self {
        self.command.stdout(descriptor);
        self
    }

    pub(crate) fn stderr(&mut self, descriptor: impl Into<Stdio>) -> &mut Self {
        self.command.stderr(descriptor);
        self
    }

    #[cfg(test)]
    pub(super) fn env(&mut self, name: &str, value: &str) -> &mut Self {
        self.command.env(name, value);
        self
    }

    /// Starts the process. Call it on a thread that lives as long as the shim: the kernel kills the process when the
    /// thread that started it ends (`PR_SET_PDEATHSIG`, prctl(2)).
    ///
    /// # Errors
    ///
    /// The errors of unshare(2) and execve(2), with the step that failed. Only root can make a pid namespace.
    pub(crate) fn spawn(&mut self) -> io::Result<Child> {
        let own = File::open("/proc/thread-self/ns/pid").map_err(named("open the shim's pid namespace"))?;
        unshare(CloneFlags::CLONE_NEWPID).map_err(named("make a pid namespace (only root on the host can)"))?;
        let child = self.command.spawn().map_err(named("execute /proc/self/exe"));
        // Otherwise, this thread could start no other thread, and its next child would be in the same namespace.
        let returned = setns(own, CloneFlags::CLONE_NEWPID).map_err(named("return to the shim's pid namespace"));
        let mut child = child?;
        if let Err(error) = returned {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(child)
    }
}

/// Adds the step to an error.
fn named<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{step}: {error}"))
    }
}
