//! A client of the QEMU guest agent, which distributions run in their guests (qemu, `qga/qapi-schema.json`).
//!
//! Belongs here: the agent's commands ([`messages`]) and the exchange of lines with it ([`connection`]). Does not
//! belong here: the port, which is a device of the vmm, and what a command is used for.
//!
//! The guest is hostile: each answer is bounded in bytes and time, and is parsed into types once. An answer that breaks
//! a bound is an error of that command. The next command synchronizes with the agent again, so the client stays usable.

mod connection;
mod error;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod messages;
#[cfg(test)]
mod tests;

use std::{io, os::unix::net::UnixStream, time::Duration};

use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

use self::{
    connection::Connection,
    messages::{Command, ExecStatus, Info, Started},
};
pub(crate) use self::{
    error::GuestAgentError,
    messages::{Finished, Program},
};

/// How long an agent may take to synchronize. One that runs and is idle takes a few milliseconds, but a guest may be
/// slow.
const SYNC_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 3000 } else { 2000 });

/// [`SYNC_LIMIT`] for a program that has never answered: it may be no agent. An exec in a guest without an agent must
/// fail within a second.
const FIRST_SYNC_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 500 });

/// How long an agent may take to answer another command. It executes one after the other, and a guest may be slow.
const ANSWER_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 10_000 });

/// The interval at which an agent is asked whether a process has ended, which it does not report by itself. Most
/// commands, such as probes, end within a few of the first intervals. They double up to the maximum, at which a long
/// process costs the guest little, and its end is noticed soon enough for a user.
const FIRST_POLL_INTERVAL: Duration = Duration::from_millis(20);
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The agent of a guest. Its commands are executed one after the other.
#[derive(Debug)]
pub(crate) struct GuestAgent {
    connection: Mutex<Connection>,
}

impl GuestAgent {
    /// A client for the agent behind `socket`. Needs the Tokio runtime.
    ///
    /// # Errors
    ///
    /// The socket cannot be registered with the runtime.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self {
            connection: Mutex::new(Connection::new(socket)?),
        })
    }

    /// Checks whether an agent answers. An agent that executes another command has time to finish it.
    pub(crate) async fn synchronize(&self) -> Result<(), GuestAgentError> {
        let connection = async { Ok(self.connection.lock().await) };
        let mut connection = within(ANSWER_LIMIT, "guest-sync-delimited", connection).await?;
        let limit = match connection.has_answered() {
            true => SYNC_LIMIT,
            false => FIRST_SYNC_LIMIT,
        };
        within(limit, "guest-sync-delimited", connection.synchronize()).await
    }

    pub(crate) async fn version(&self) -> Result<String, GuestAgentError> {
        let info: Info = self.run(&Command::Info).await?;
        Ok(info.version())
    }

    /// Starts a process in the guest. Returns its pid there.
    pub(crate) async fn start(&self, program: &Program) -> Result<u32, GuestAgentError> {
        // Otherwise the next bytes may be a part of an answer of an agent that ended before this one started.
        self.synchronize().await?;
        let started: Started = self.run(&Command::Exec(program)).await?;
        Ok(started.pid)
    }

    /// Waits for the end of a process that [`Self::start`] started. The agent forgets it then.
    pub(crate) async fn wait(&self, pid: u32) -> Result<Finished, GuestAgentError> {
        let mut interval = FIRST_POLL_INTERVAL;
        loop {
            tokio::time::sleep(interval).await;
            let status: ExecStatus = self.run(&Command::ExecStatus { pid }).await?;
            if let Some(finished) = status.finished()? {
                return Ok(finished);
            }
            interval = (interval * 2).min(MAX_POLL_INTERVAL);
        }
    }

    async fn run<T: DeserializeOwned>(&self, command: &Command<'_>) -> Result<T, GuestAgentError> {
        let run = async {
            let mut connection = self.connection.lock().await;
            if !connection.is_synchronized() {
                connection.synchronize().await?;
            }
            let line = connection.exchange(&command.to_line()?).await?;
            let answer = messages::parse(command.name(), &line);
            if matches!(answer, Err(GuestAgentError::Malformed { .. })) {
                connection.lose_synchronization();
            }
            answer
        };
        within(ANSWER_LIMIT, command.name(), run).await
    }
}

/// Limits the time of a command, including the wait for earlier ones.
async fn within<T>(
    limit: Duration,
    command: &'static str,
    run: impl Future<Output = Result<T, GuestAgentError>>,
) -> Result<T, GuestAgentError> {
    let outcome = tokio::time::timeout(limit, run).await;
    outcome.unwrap_or(Err(GuestAgentError::Silent { command, limit }))
}
