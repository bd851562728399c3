//! The exchange of lines with a QEMU guest agent.

use std::{io, os::unix::net::UnixStream as StdUnixStream};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{error::GuestAgentError, messages};

/// The maximum length of a line in bytes. The whole output of a process is in one, as Base64.
pub(super) const MAX_LINE: usize = 4 << 20;

/// How many bytes, such as those of earlier answers, are discarded before the answer to `guest-sync-delimited`.
pub(super) const MAX_DISCARDED: usize = 16 << 20;

/// How many bytes one system call reads.
const READ_SIZE: usize = 64 << 10;

/// A byte that no JSON text has. The agent sends it before the answer to `guest-sync-delimited`, and drops a part of a
/// command when it receives one.
const DELIMITER: u8 = 0xff;

/// A connection to a QEMU guest agent.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    /// Bytes that were read. At most [`MAX_LINE`] plus [`READ_SIZE`] of them are not consumed.
    received: Vec<u8>,
    /// How many bytes at the start of `received` are consumed.
    consumed: usize,
    /// The next line is the answer to the next command.
    is_synchronized: bool,
    /// An agent has synchronized before.
    has_answered: bool,
    last_id: u32,
}

impl Connection {
    pub(super) fn new(socket: StdUnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: UnixStream::from_std(socket)?,
            received: Vec::new(),
            consumed: 0,
            is_synchronized: false,
            has_answered: false,
            last_id: 0,
        })
    }

    pub(super) fn is_synchronized(&self) -> bool {
        self.is_synchronized
    }

    pub(super) fn has_answered(&self) -> bool {
        self.has_answered
    }

    pub(super) fn lose_synchronization(&mut self) {
        self.is_synchronized = false;
    }

    /// Discards everything up to the answer to a new `guest-sync-delimited`.
    pub(super) async fn synchronize(&mut self) -> Result<(), GuestAgentError> {
        self.is_synchronized = false;
        self.last_id = self.last_id.wrapping_add(1);
        let mut line = vec![DELIMITER];
        line.extend(messages::synchronization(self.last_id)?);
        self.socket.write_all(&line).await?;
        let mut discarded = 0;
        while discarded <= MAX_DISCARDED {
            let unread = self.unread();
            let Some(delimiter) = unread.iter().position(|byte| *byte == DELIMITER) else {
                let count = unread.len();
                discarded += count;
                self.consume(count);
                self.receive().await?;
                continue;
            };
            self.consume(delimiter + 1);
            let answer = self.next_line().await?;
            if messages::is_synchronization(&answer, self.last_id) {
                self.is_synchronized = true;
                self.has_answered = true;
                return Ok(());
            }
            // The line may be the answer to an earlier `guest-sync-delimited`.
            discarded += delimiter + 1 + answer.len();
        }
        Err(GuestAgentError::NotSynchronized(MAX_DISCARDED))
    }

    /// Sends a command and returns the next line. The connection is not synchronized if this fails or is cancelled.
    pub(super) async fn exchange(&mut self, command: &[u8]) -> Result<Vec<u8>, GuestAgentError> {
        self.is_synchronized = false;
        self.socket.write_all(command).await?;
        let line = self.next_line().await?;
        self.is_synchronized = true;
        Ok(line)
    }

    async fn next_line(&mut self) -> Result<Vec<u8>, GuestAgentError> {
        let mut searched = 0;
        loop {
            let unread = self.unread();
            if let Some(length) = unread[searched..].iter().position(|byte| *byte == b'\n') {
                return Ok(self.take_line(searched + length));
            }
            searched = unread.len();
            if searched > MAX_LINE {
                self.consume(searched);
                return Err(GuestAgentError::LineTooLong(MAX_LINE));
            }
            self.receive().await?;
        }
    }

    /// Takes the next `length` bytes, and the end of line after them. Does not copy a long line. A short one is copied,
    /// because otherwise each of many short lines would move all bytes after it.
    fn take_line(&mut self, length: usize) -> Vec<u8> {
        if length <= READ_SIZE {
            let line = self.unread()[..length].to_vec();
            self.consume(length + 1);
            return line;
        }
        self.received.drain(..self.consumed);
        self.consumed = 0;
        let rest = self.received.split_off(length + 1);
        let mut line = std::mem::replace(&mut self.received, rest);
        line.truncate(length);
        line
    }

    fn unread(&self) -> &[u8] {
        &self.received[self.consumed..]
    }

    fn consume(&mut self, count: usize) {
        self.consumed += count;
        if self.consumed == self.received.len() {
            // A long answer must not keep its memory.
            self.received = Vec::new();
            self.consumed = 0;
        }
    }

    /// Waits for more bytes.
    async fn receive(&mut self) -> Result<(), GuestAgentError> {
        self.received.drain(..self.consumed);
        self.consumed = 0;
        self.received.reserve(READ_SIZE);
        let mut limited = (&mut self.socket).take(READ_SIZE as u64);
        match limited.read_buf(&mut self.received).await? {
            0 => Err(GuestAgentError::Closed),
            _ => Ok(()),
        }
    }
}
