//! Containers: the event loop's records of them, and the jobs that create, start, enter and delete one.
//!
//! [`Container`] and [`Process`] are the records. `create`, `exec`, `delete` and a start with hooks run in jobs (see
//! [`crate::job`]) and may block; a start without hooks does not block and runs in the event loop. In a virtual machine
//! with a user's kernel, `guest_process` runs processes outside of containers. Nothing here sends to the host. The
//! event loop calls this.

pub(crate) mod create;
pub(crate) mod delete;
mod diagnosis;
pub(crate) mod exec;
mod executor;
pub(crate) mod guest_process;
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

/// The directory in which libcontainer keeps the state of containers.
const STATE_PATH: &str = "/run/nutshell/state";

/// The bundle directory of a container.
fn bundle_path(id: &str) -> PathBuf {
    Path::new(CONTAINERS_PATH).join(id)
}

/// The directory in which libcontainer keeps the state of one container.
fn state_path(id: &str) -> PathBuf {
    Path::new(STATE_PATH).join(id)
}

/// The lifecycle stage of a container. Error texts contain its name in lowercase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A job is creating it.
    Creating,
    /// Its first process waits for the start request.
    Created,
    /// Its first process has been started.
    Running,
    /// Its first process has ended.
    Stopped,
    /// A job is deleting it, or has deleted it but some exits of its processes are not reported yet.
    Deleting,
}

/// The record of a container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) stage: Stage,
    /// The OCI spec as received, in JSON.
    pub(crate) spec: Rc<[u8]>,
    /// Its cgroup. The job that creates the container creates it, too.
    pub(crate) cgroup: Cgroup,
    /// Its first process.
    pub(crate) init: Process,
    /// Execs whose exits have not been reported, by id.
    pub(crate) execs: BTreeMap<String, Process>,
    /// The watch for out-of-memory kills, once the container is created.
    pub(crate) memory_watch: Option<MemoryWatch>,
    /// A pidfd of its first process, once the container is created.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Whether its processes are frozen.
    pub(crate) paused: bool,
    /// The id of the delete request, once the job has deleted the container and only exits of its processes are not
    /// reported yet.
    pub(crate) deletion: Option<u64>,
}

impl Container {
    /// Returns the record of a container that a job is creating.
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

    /// Returns the record of a guest as a whole, which has only execs.
    pub(crate) fn of_guest(id: &str) -> Self {
        Self {
            stage: Stage::Running,
            ..Self::new(id, Rc::from([]))
        }
    }

    /// Returns the record of an exec, or of the first process if `exec` is `None`.
    pub(crate) fn process(&mut self, exec: Option<&str>) -> Option<&mut Process> {
        match exec {
            None => Some(&mut self.init),
            Some(exec) => self.execs.get_mut(exec),
        }
    }
}

/// The record of a container's process. After its exit is reported, the record of a first process is empty, and that
/// of an exec is removed.
#[derive(Debug, Default)]
pub(crate) struct Process {
    /// `None` until a job has reported it, and in an empty record.
    pub(crate) pid: Option<Pid>,
    /// The source numbers of the pumps of its standard input, output and error.
    pub(crate) pumps: [Option<u32>; 3],
    /// The master of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// Its exit, until it is reported, and the number of bytes that it had written to standard output and error by
    /// then.
    pub(crate) exit: Option<(ProcessExit, [u64; 2])>,
    /// The signal to report as the cause of its exit, if it was killed with SIGKILL instead because it would have
    /// ignored that signal.
    pub(crate) reported_signal: Option<u32>,
    /// It is an exec whose job is running, and must be killed when the job reports its pid.
    pub(crate) kill_when_started: bool,
}
