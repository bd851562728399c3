//! One direction of one standard stream.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

/// How much moves by one system call at most.
const MAX_CHUNK: usize = 64 << 10;

/// How much is read for or from a terminal at once: the most that it gives.
const TERMINAL_READ_SIZE: usize = 4 << 10;

/// How many chunks a pump moves before others have their turn.
const MAX_CHUNKS_PER_TURN: usize = 16;

/// How much of a terminal's output is taken at the end of its process at most. The kernel holds no
/// more than this back for a terminal.
const MAX_TERMINAL_BACKLOG: usize = 128 << 10;

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing to do until a descriptor becomes ready.
    Waiting,
    /// There is more to do.
    More,
    /// This direction has ended; its descriptors are closed.
    Ended,
}

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProcessSide {
    /// One end is a pipe: the kernel moves the bytes.
    Pipe,
    /// One end is a terminal, which cannot be spliced: they go through `pending`.
    Terminal,
}

/// One direction of one standard stream.
#[derive(Debug)]
pub(crate) struct Pump {
    ends: Option<Ends>,
    process_side: ProcessSide,
    pending: Vec<u8>,
    /// Bytes taken from the source.
    taken: u64,
}

#[derive(Debug)]
struct Ends {
    source: OwnedFd,
    sink: OwnedFd,
    /// Which end is the stream to the host.
    host_side: HostSide,
    /// The source has ended, `pending` is all that is left.
    source_ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostSide {
    Source,
    Sink,
}

impl Pump {
    fn new(source: OwnedFd, sink: OwnedFd, host_side: HostSide, process_side: ProcessSide) -> Self {
        Self {
            ends: Some(Ends {
                source,
                sink,
                host_side,
                source_ended: false,
            }),
            process_side,
            pending: Vec::new(),
            taken: 0,
        }
    }

    /// From the host to a process's standard input.
    pub(crate) fn input(stream: OwnedFd, pipe: OwnedFd) -> Self {
        Self::new(stream, pipe, HostSide::Source, ProcessSide::Pipe)
    }

    /// From a process's standard output or error to the host.
    pub(crate) fn output(pipe: OwnedFd, stream: OwnedFd) -> Self {
        Self::new(pipe, stream, HostSide::Sink, ProcessSide::Pipe)
    }

    /// From the host to a terminal.
    pub(crate) fn terminal_input(stream: OwnedFd, terminal: OwnedFd) -> Self {
        Self::new(stream, terminal, HostSide::Source, ProcessSide::Terminal)
    }

    /// From a terminal to the host.
    pub(crate) fn terminal_output(terminal: OwnedFd, stream: OwnedFd) -> Self {
        Self::new(terminal, stream, HostSide::Sink, ProcessSide::Terminal)
    }

    /// The descriptors whose readiness matters.
    pub(crate) fn descriptors(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let ends = self.ends.as_ref()?;
        Some([ends.source.as_fd(), ends.sink.as_fd()])
    }

    /// Whether this direction has ended.
    pub(crate) fn is_ended(&self) -> bool {
        self.ends.is_none()
    }

    /// Moves what can be moved now.
    pub(crate) fn transfer(&mut self) -> Progress {
        if self.ends.is_none() {
            return Progress::Ended;
        }
        for _ in 0..MAX_CHUNKS_PER_TURN {
            let step = match self.process_side {
                ProcessSide::Pipe => self.splice(),
                ProcessSide::Terminal => self.copy(),
            };
            match step {
                Ok(true) => {}
                Ok(false) => return self.close(),
                Err(Errno::AGAIN) => {
                    return if self.sink_is_gone() {
                        self.close()
                    } else {
                        Progress::Waiting
                    };
                }
                Err(Errno::INTR) => {}
                // EPIPE, ECONNRESET: nobody reads. EIO: the terminal's last user is gone.
                Err(_) => return self.close(),
            }
        }
        Progress::More
    }

    /// `Ok(false)` at the source's end.
    fn splice(&mut self) -> Result<bool, Errno> {
        let Some(ends) = &self.ends else { return Ok(false) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = rustix::pipe::splice(&ends.source, None, &ends.sink, None, MAX_CHUNK, flags)?;
        self.taken += moved as u64;
        Ok(moved > 0)
    }

    /// `Ok(false)` when the source has ended and everything of it was written.
    fn copy(&mut self) -> Result<bool, Errno> {
        if self.pending.is_empty() {
            self.read_pending()?;
        }
        let Some(ends) = &self.ends else { return Ok(false) };
        if self.pending.is_empty() {
            return Ok(false);
        }
        let written = rustix::io::write(&ends.sink, &self.pending)?;
        self.pending.drain(..written);
        Ok(!self.pending.is_empty() || !ends.source_ended)
    }

    /// Reads once into `pending`, which stays empty at the source's end.
    fn read_pending(&mut self) -> Result<(), Errno> {
        let Some(ends) = &mut self.ends else { return Ok(()) };
        if ends.source_ended {
            return Ok(());
        }
        self.pending.reserve(TERMINAL_READ_SIZE);
        match rustix::io::read(&ends.source, rustix::buffer::spare_capacity(&mut self.pending)) {
            Ok(0) | Err(Errno::IO) => ends.source_ended = true,
            Ok(read) => self.taken += read as u64,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether nobody takes what the source may still give: the pipe to a process has lost its last
    /// reader, or the host has closed the stream, which it never does to an output in part.
    fn sink_is_gone(&self) -> bool {
        let Some(ends) = &self.ends else { return true };
        let gone = match (ends.host_side, self.process_side) {
            (HostSide::Sink, _) => PollFlags::ERR | PollFlags::HUP | PollFlags::RDHUP,
            (HostSide::Source, ProcessSide::Pipe) => PollFlags::ERR,
            // A terminal is there for whoever opens it next.
            (HostSide::Source, ProcessSide::Terminal) => return false,
        };
        let mut poll = [PollFd::new(&ends.sink, PollFlags::RDHUP)];
        rustix::event::poll(&mut poll, Some(&Timespec::default())).is_ok() && poll[0].revents().intersects(gone)
    }

    /// How many bytes the process and its children have written so far. At the end of a process whose
    /// output is a terminal, what the kernel holds is taken first: it cannot be counted there.
    pub(crate) fn bytes_written(&mut self) -> u64 {
        if self.process_side == ProcessSide::Terminal {
            while self.pending.len() < MAX_TERMINAL_BACKLOG {
                let before = self.pending.len();
                match self.read_pending() {
                    Ok(()) if self.pending.len() > before => {}
                    Err(Errno::INTR) => {}
                    Ok(()) | Err(_) => break,
                }
            }
            return self.taken;
        }
        let waiting = self
            .ends
            .as_ref()
            .and_then(|ends| rustix::io::ioctl_fionread(&ends.source).ok())
            .unwrap_or(0);
        self.taken + waiting
    }

    fn close(&mut self) -> Progress {
        self.ends = None;
        self.pending = Vec::new();
        Progress::Ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use rustix::pipe::{PipeFlags, pipe_with};

    fn stream() -> (OwnedFd, OwnedFd) {
        let (ours, host) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        (ours, host)
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::NONBLOCK).unwrap()
    }

    fn read_all(fd: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        match rustix::io::read(fd, &mut bytes) {
            Ok(read) => bytes.truncate(read),
            Err(Errno::AGAIN) => bytes.clear(),
            Err(error) => panic!("{error}"),
        }
        bytes
    }

    #[test]
    fn output_reaches_the_host_and_ends_with_the_process() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        rustix::io::write(&writer, b"hello").unwrap();
        assert_eq!(pump.transfer(), Progress::Waiting);
        assert_eq!(read_all(&host), b"hello");
        drop(writer);
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(rustix::io::read(&host, &mut [0; 8]).unwrap(), 0);
        assert_eq!(pump.bytes_written(), 5);
    }

    #[test]
    fn written_counts_what_the_host_has_not_taken() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        let mut total = 0;
        loop {
            match rustix::io::write(&writer, &[b'x'; 4096]) {
                Ok(written) => total += written as u64,
                Err(_) if pump.transfer() == Progress::Waiting && rustix::io::write(&writer, b"x").is_err() => break,
                Err(_) => total += u64::from(rustix::io::write(&writer, b"x").is_ok()),
            }
        }
        assert!(pump.bytes_written() >= total, "{} of {total}", pump.bytes_written());
        drop(host);
    }

    #[test]
    fn input_ends_when_the_host_has_no_more() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::input(ours, writer);
        rustix::io::write(&host, b"data").unwrap();
        rustix::net::shutdown(&host, rustix::net::Shutdown::Write).unwrap();
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(read_all(&reader), b"data");
        assert_eq!(rustix::io::read(&reader, &mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn input_ends_when_nobody_reads_it() {
        let (reader, writer) = pipe();
        let (ours, _host) = stream();
        let mut pump = Pump::input(ours, writer);
        assert_eq!(pump.transfer(), Progress::Waiting);
        drop(reader);
        assert_eq!(pump.transfer(), Progress::Ended);
    }

    #[test]
    fn host_that_goes_away_ends_the_output() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        drop(host);
        rustix::io::write(&writer, b"lost").unwrap();
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn host_that_goes_away_ends_an_output_that_says_nothing() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        assert_eq!(pump.transfer(), Progress::Waiting);
        drop(host);
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn endless_output_leaves_others_their_turn() {
        let zero = rustix::fs::open("/dev/zero", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty()).unwrap();
        let mut pump = Pump::terminal_output(zero, null);
        assert_eq!(pump.transfer(), Progress::More);
        assert!(pump.taken > 0);
    }
}
