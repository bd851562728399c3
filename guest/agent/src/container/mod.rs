//! What the agent knows of a container, and the jobs that make, enter and remove one.
//!
//! [`Container`] and [`Process`] are the event loop's records. `create`, `exec` and `delete` run in
//! jobs (see [`crate::job`]) and may block; the rest is quick and runs in the loop. Nothing here
//! talks to the host.

pub(crate) mod create;
pub(crate) mod delete;
mod diagnosis;
pub(crate) mod exec;
mod executor;
pub(crate) mod hooks;
mod program;
mod rootfs;
mod scheduling;
mod spec;
pub(crate) mod start;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nutshell_protocol::CONTAINERS_PATH;
use rustix::process::Pid;

use crate::cgroup::{Cgroup, MemoryWatch};
use crate::reaper::ProcessExit;

/// Where libcontainer keeps what it knows of containers.
const STATE_PATH: &str = "/run/nutshell/state";

/// A container's folder: its bundle.
fn bundle_path(id: &str) -> PathBuf {
    Path::new(CONTAINERS_PATH).join(id)
}

/// libcontainer's folder for a container.
fn state_path(id: &str) -> PathBuf {
    Path::new(STATE_PATH).join(id)
}

/// Where in its life a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A job makes it.
    Creating,
    /// Its first process waits for its start.
    Created,
    /// Its first process runs.
    Running,
    /// Its first process has ended.
    Stopped,
    /// A job removes it.
    Deleting,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Where in its life it is.
    pub(crate) stage: Stage,
    /// The OCI spec as it came.
    pub(crate) spec: Rc<[u8]>,
    /// Its cgroup; a job makes it.
    pub(crate) cgroup: Cgroup,
    /// Its first process.
    pub(crate) init: Process,
    /// Further processes that have not ended, by exec id.
    pub(crate) execs: BTreeMap<String, Process>,
    /// Its out-of-memory watch.
    pub(crate) memory_watch: Option<MemoryWatch>,
    /// A pidfd of its first process, once that exists.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Its processes are frozen.
    pub(crate) paused: bool,
    /// It is removed, but for its last processes' ends; the request that waits for them.
    pub(crate) deletion: Option<u64>,
}

impl Container {
    /// A container that a job is making.
    pub(crate) fn new(id: &str, spec: Rc<[u8]>) -> Self {
        Self {
            stage: Stage::Creating,
            spec,
            cgroup: Cgroup::of_container(id),
            init: Process::default(),
            execs: BTreeMap::new(),
            memory_watch: None,
            pidfd: None,
            paused: false,
            deletion: None,
        }
    }

    /// The first process or an exec.
    pub(crate) fn process(&mut self, exec: Option<&str>) -> Option<&mut Process> {
        match exec {
            None => Some(&mut self.init),
            Some(exec) => self.execs.get_mut(exec),
        }
    }
}

/// A process of a container.
#[derive(Debug, Default)]
pub(crate) struct Process {
    /// Known once it exists.
    pub(crate) pid: Option<Pid>,
    /// The pumps of its standard streams.
    pub(crate) pumps: [Option<u32>; 3],
    /// Its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// How it ended, and how much it had written then, until that is reported.
    pub(crate) exit: Option<(ProcessExit, [u64; 2])>,
    /// The signal that is to be reported_signal for its end (it ignored that one, and was killed).
    pub(crate) reported_signal: Option<u32>,
}
