//! The event loop: who waits for what, and the state of it all.
//!
//! `requests` takes what the host asks for, `reports` what jobs have done, `exits` tells what ends,
//! `streams` has the pumps. The first three are parts of [`Agent`]; the loop is the only caller.

mod exits;
mod reports;
mod requests;
mod streams;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::rc::Rc;

use nutshell_protocol::{Event, FromAgent, Ready, Reply, Response, SetUpPod};

use crate::connection::{ControlError, ControlStream, HostAddress};
use crate::container::Container;
use crate::job::Job;
use crate::pod::Pod;
use crate::poller::{Poller, Token};
use crate::reaper::Reaper;
use crate::stdio::AgentEnds;
use streams::Streams;

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The way to the host is gone.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The kernel refuses what the loop is made of.
    #[error("the event loop cannot go on: {0}")]
    System(#[from] io::Error),
}

/// What a job is for.
#[derive(Debug)]
enum Purpose {
    /// Makes ready what the pod's containers share.
    SetUpPod(Box<SetUpPod>),
    /// Makes a container.
    Create(Rc<str>),
    /// Runs an exec of a container.
    Exec(Rc<str>, String),
    /// Freezes a container, or thaws it.
    Freeze(Rc<str>, bool),
    /// Removes a container.
    Delete(Rc<str>),
    /// Its reply is all that there is to it.
    Other,
}

/// A job that the host waits for.
#[derive(Debug)]
struct PendingJob {
    job: Job,
    request: u64,
    purpose: Purpose,
    agent_ends: Option<AgentEnds>,
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    poller: Poller,
    host: HostAddress,
    control: ControlStream,
    reaper: Reaper,
    streams: Streams,
    /// Once it was set up.
    pod: Option<Pod>,
    containers: BTreeMap<Rc<str>, Container>,
    pending_jobs: BTreeMap<u32, PendingJob>,
    /// The last number given to an event source.
    last_source_number: u32,
}

impl Agent {
    /// Dials the host and greets it.
    pub(crate) fn connect(host: HostAddress) -> Result<Self, AgentError> {
        let reaper = Reaper::new()?;
        let control = ControlStream::dial(&host)?;
        let poller = Poller::new()?;
        poller.watch_changes(&control, Token::Control)?;
        poller.watch_input(&reaper, Token::Signals)?;
        let mut agent = Self {
            poller,
            host,
            control,
            reaper,
            streams: Streams::default(),
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

    /// Serves until the host is gone.
    pub(crate) fn serve(mut self) -> Result<Infallible, AgentError> {
        loop {
            let tokens = self.poller.wait(!self.streams.has_more())?;
            self.streams.transfer_ready();
            for token in tokens {
                match token {
                    Token::Control => self.handle_requests()?,
                    Token::Signals => self.handle_exits()?,
                    Token::Job(number) => self.handle_report(number)?,
                    Token::Pump(number) => self.streams.transfer(number),
                    Token::Memory(number) => self.handle_memory_event(number)?,
                }
            }
        }
    }

    fn handle_requests(&mut self) -> Result<(), AgentError> {
        self.control.flush()?;
        while let Some(message) = self.control.next()? {
            self.handle(message)?;
        }
        Ok(())
    }

    fn send(&mut self, message: &FromAgent) -> Result<(), AgentError> {
        Ok(self.control.send(message)?)
    }

    fn reply(&mut self, id: u64, result: Result<Response, nutshell_protocol::Failure>) -> Result<(), AgentError> {
        self.send(&FromAgent::Reply(Reply { id, result }))
    }

    fn event(&mut self, event: Event) -> Result<(), AgentError> {
        self.send(&FromAgent::Event(event))
    }

    fn next_source_number(&mut self) -> u32 {
        self.last_source_number = self.last_source_number.wrapping_add(1);
        self.last_source_number
    }
}
