//! The behaviours of fake machines.

use nutshell_protocol::{BlockedThread, Request};

/// How a fake machine reacts to the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// It does everything that is requested.
    Cooperative,
    /// It cannot be built.
    BootFails,
    /// The machine for a user's kernel is never built.
    NeverBuilt,
    /// Its agent never becomes ready.
    NeverReady,
    /// It boots and creates containers, and answers no other request.
    Unresponsive,
    /// It never answers requests of one kind.
    Ignores(Ignored),
    /// It finds the kernel on a disk once, and never answers again.
    ReadsDiskOnce,
    /// It finds no kernel on a disk.
    NoKernel,
    /// Its guest does not listen to the power button, as before its init has started.
    IgnoresPowerButton,
    /// It cannot grow.
    CannotGrow,
    /// Its guest takes no memory.
    NeverPlugsMemory,
    /// The guest adds memory and does not use it.
    LeavesMemoryOffline,
    /// It does not answer questions about its devices.
    NoStatistics,
    /// It reports no stream as drained before [`Fake::report_drained`](super::fake::Fake::report_drained).
    NeverDrains,
    /// Its vmm waits for a disk that does not answer, and cannot be killed before
    /// [`Fake::release_disk`](super::fake::Fake::release_disk).
    WaitsForDisk,
    /// Its processes do not end after SIGKILL.
    SurvivesKill(Survival),
    /// After the end of its vmm, another process holds all that the vmm had open.
    OutlivedByFork,
}

/// A kind of request that the agent does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ignored {
    CreateContainer,
    StartContainer,
    StartExec,
}

/// The state of a process that was sent SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survival {
    /// It runs, to free its memory for example.
    Running,
    /// It waits for a disk that is slow.
    Progressing,
    /// It waits for a disk that does not answer.
    Blocked,
}

impl Behaviour {
    pub(super) fn answers(self, request: &Request) -> bool {
        match (self, request) {
            (Self::Unresponsive, request) => matches!(request, Request::CreateContainer(_)),
            (Self::Ignores(Ignored::CreateContainer), Request::CreateContainer(_))
            | (Self::Ignores(Ignored::StartContainer), Request::StartContainer { .. })
            | (Self::Ignores(Ignored::StartExec), Request::StartExec(_)) => false,
            _ => true,
        }
    }

    /// The threads that are blocked after `requests` requests.
    pub(super) fn blocked_threads(self, requests: usize) -> Vec<BlockedThread> {
        let switches = match self {
            Self::SurvivesKill(Survival::Blocked) => 7,
            Self::SurvivesKill(Survival::Progressing) => requests.try_into().unwrap(),
            _ => return Vec::new(),
        };
        vec![BlockedThread {
            pid: 1000,
            thread: 1000,
            name: "dd".to_owned(),
            switches,
        }]
    }
}
