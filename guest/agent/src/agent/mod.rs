//! The event loop and its state: the containers, the running jobs, the pumps.
//!
//! `requests` handles the host's requests, `reports` the reports of jobs, and `exits` the exits of processes; all three
//! are parts of [`Agent`]. `pumps` holds the pumps, `signals` sends signals, and `blocked` finds threads that cannot
//! end. Nothing here may block: work that may block runs in a job. Only `main` calls this.

mod blocked;
mod exits;
mod pumps;
mod reports;
mod requests;
mod signals;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::rc::Rc;

use nutshell_protocol::{Event, Failure, FromAgent, Ready, Reply, Response, SetUpPod};
use rustix::process::Pid;

use crate::connection::{AgentStream, AgentStreamError, HostAddress};
use crate::container::Container;
use crate::job::Job;
use crate::machine::clock::Clock;
use crate::pod::Pod;
use crate::poller::{Poller, Token};
use crate::reaper::Reaper;
use crate::stdio::AgentEnds;
use pumps::Pumps;

/// Why the event loop ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The agent stream failed or was closed.
    #[error(transparent)]
    Stream(#[from] AgentStreamError),
    /// A system call failed while the agent connected to the host, or in the event loop itself.
    #[error("cannot {step}: {source}")]
    System { step: &'static str, source: io::Error },
}

impl AgentError {
    /// Returns a function that adds the failed `step`, in the infinitive, to an error of the kernel.
    pub(crate) fn system(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { step, source }
    }
}

/// The purpose of a job, which decides how its report is handled.
#[derive(Debug)]
enum Purpose {
    /// Sets up the resources that the pod's containers share.
    SetUpPod(Box<SetUpPod>),
    /// Creates the container.
    Create(Rc<str>),
    /// Starts the container with this first process.
    Start(Rc<str>, Option<Pid>),
    /// Starts the exec in the container.
    Exec(Rc<str>, String),
    /// Freezes the container if `true`, thaws it if `false`.
    Freeze(Rc<str>, bool),
    /// Deletes the container.
    Delete(Rc<str>),
    /// Deletes the container, and leaves processes that do not end.
    Abandon(Rc<str>),
    /// Deletes the container, whose creation failed with this error.
    Discard(Rc<str>, Failure),
    /// The report only becomes a reply; it changes no state.
    Other,
}

impl fmt::Display for Purpose {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetUpPod(_) => formatter.write_str("set up the pod"),
            Self::Create(name) => write!(formatter, "create container {name}"),
            Self::Start(name, _) => write!(formatter, "start container {name}"),
            Self::Exec(name, exec) => write!(formatter, "start exec {exec} of container {name}"),
            Self::Freeze(name, true) => write!(formatter, "pause container {name}"),
            Self::Freeze(name, false) => write!(formatter, "resume container {name}"),
            Self::Delete(name) | Self::Abandon(name) | Self::Discard(name, _) => {
                write!(formatter, "delete container {name}")
            }
            Self::Other => formatter.write_str("a request of the host"),
        }
    }
}

/// A running job, whose report becomes the reply to a request.
#[derive(Debug)]
struct PendingJob {
    job: Job,
    /// The id of the request.
    request: u64,
    purpose: Purpose,
    agent_ends: Option<AgentEnds>,
}

/// What the agent is in its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// PID 1 of nutshell's machine. It runs containers.
    Init,
    /// A service of a user's system. It runs processes in the guest itself: each container id of a request stands for
    /// the guest as a whole.
    Service,
}

/// The state of the event loop.
#[derive(Debug)]
pub(crate) struct Agent {
    role: Role,
    poller: Poller,
    host: HostAddress,
    stream: AgentStream,
    reaper: Reaper,
    pumps: Pumps,
    clock: Clock,
    /// `None` until the pod has been set up.
    pod: Option<Pod>,
    containers: BTreeMap<Rc<str>, Container>,
    /// The running jobs, by source number.
    pending_jobs: BTreeMap<u32, PendingJob>,
    /// The number most recently assigned to an event source.
    last_source_number: u32,
}

impl Agent {
    /// Connects to the host, and reports that the agent is ready.
    pub(crate) fn connect(role: Role, host: HostAddress) -> Result<Self, AgentError> {
        let reaper = Reaper::new().map_err(AgentError::system("receive SIGCHLD"))?;
        let stream = AgentStream::dial(&host).map_err(AgentError::system("connect to the host"))?;
        let poller = Poller::new().map_err(AgentError::system("create an epoll instance"))?;
        poller
            .watch_changes(&stream, Token::Host)
            .map_err(AgentError::system("watch the agent stream"))?;
        poller
            .watch_input(&reaper, Token::Signals)
            .map_err(AgentError::system("watch SIGCHLD"))?;
        let mut agent = Self {
            role,
            poller,
            host,
            stream,
            reaper,
            pumps: Pumps::default(),
            clock: Clock::default(),
            pod: None,
            containers: BTreeMap::new(),
            pending_jobs: BTreeMap::new(),
            last_source_number: 0,
        };
        agent.send(&FromAgent::Ready(Ready {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }))?;
        Ok(agent)
    }

    /// Runs the event loop until the host closes the agent stream or an error occurs.
    pub(crate) fn serve(mut self) -> Result<Infallible, AgentError> {
        loop {
            let tokens = self.poller.wait(!self.pumps.has_more());
            let tokens = tokens.map_err(AgentError::system("wait for events"))?;
            self.pumps.transfer_ready();
            for token in tokens {
                match token {
                    Token::Host => self.handle_requests()?,
                    Token::Signals => self.handle_exits()?,
                    Token::Job(number) => self.handle_report(number)?,
                    Token::Pump(number) => self.pumps.transfer(number),
                    Token::Memory(number) => self.handle_memory_event(number)?,
                    Token::Clock => self.clock.end_temporary_rate(),
                }
            }
        }
    }

    fn handle_requests(&mut self) -> Result<(), AgentError> {
        self.stream.flush()?;
        while let Some(message) = self.stream.next()? {
            self.handle(message)?;
        }
        Ok(())
    }

    fn send(&mut self, message: &FromAgent) -> Result<(), AgentError> {
        Ok(self.stream.send(message)?)
    }

    fn reply(&mut self, id: u64, result: Result<Response, Failure>) -> Result<(), AgentError> {
        self.send(&FromAgent::Reply(Reply { id, result }))
    }

    fn send_event(&mut self, event: Event) -> Result<(), AgentError> {
        self.send(&FromAgent::Event(event))
    }

    fn next_source_number(&mut self) -> u32 {
        self.last_source_number = self.last_source_number.wrapping_add(1);
        self.last_source_number
    }
}
