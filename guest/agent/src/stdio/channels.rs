//! The process's side of its standard streams.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nutshell_protocol::Stdio;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use super::Pump;
use crate::connection::Host;

/// What a process gets as descriptors 0, 1 and 2. A process with a terminal gets that instead.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    /// Standard input, output and error.
    pub(crate) ends: [OwnedFd; 3],
    /// Which of them are pipes: made for this process, to be owned by its user.
    pub(crate) pipes: [bool; 3],
}

impl ProcessEnds {
    /// The descriptors that a job must keep open to make the process.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.ends[0].as_fd(), self.ends[1].as_fd(), self.ends[2].as_fd()]
    }

    /// Makes `uid` the owner of the pipes: a process that is not root may then open its own
    /// `/dev/stdout` again.
    pub(crate) fn give_to(&self, uid: u32) -> io::Result<()> {
        for (end, _) in self.ends.iter().zip(self.pipes).filter(|(_, pipe)| *pipe) {
            rustix::fs::fchown(end, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        }
        Ok(())
    }
}

/// The agent's side of a process's standard streams, before the process exists.
#[derive(Debug)]
pub(crate) struct Channels {
    /// Standard input, output and error, where there is a stream and no terminal.
    pub(crate) pumps: [Option<Pump>; 3],
    /// The streams of the terminal's input and output.
    pub(crate) terminal: [Option<OwnedFd>; 2],
}

impl Channels {
    /// Dials the host's streams and makes what a process is connected to.
    pub(crate) fn open(host: &Host, stdio: &Stdio) -> io::Result<(Self, ProcessEnds)> {
        let mut channels = Self {
            pumps: [None, None, None],
            terminal: [None, None],
        };
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let mut ends = [null.try_clone()?, null.try_clone()?, null];
        let mut pipes = [false; 3];
        for (index, port) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
            let Some(port) = port else { continue };
            let stream = host.dial(port)?;
            if stdio.terminal {
                if let Some(slot) = channels.terminal.get_mut(index) {
                    *slot = Some(stream);
                }
                continue;
            }
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (ours, theirs) = if index == 0 { (writer, reader) } else { (reader, writer) };
            rustix::io::ioctl_fionbio(&ours, true)?;
            channels.pumps[index] = Some(if index == 0 {
                Pump::input(stream, ours)
            } else {
                Pump::output(ours, stream)
            });
            ends[index] = theirs;
            pipes[index] = true;
        }
        Ok((channels, ProcessEnds { ends, pipes }))
    }

    /// The pumps of a process without terminal, or those of `terminal`.
    pub(crate) fn into_pumps(self, terminal: Option<&OwnedFd>) -> io::Result<[Option<Pump>; 3]> {
        let Some(terminal) = terminal else {
            return Ok(self.pumps);
        };
        rustix::io::ioctl_fionbio(terminal, true)?;
        let [input, output] = self.terminal;
        let input = input.map(|stream| Ok::<_, io::Error>(Pump::keyboard(stream, terminal.try_clone()?)));
        let output = output.map(|stream| Ok::<_, io::Error>(Pump::screen(terminal.try_clone()?, stream)));
        Ok([input.transpose()?, output.transpose()?, None])
    }
}
