//! The pump of one standard stream.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

/// The maximum number of bytes that one splice(2) moves.
const MAX_CHUNK: usize = 64 << 10;

/// The maximum number of bytes in one read if one end is a terminal. A terminal returns no more.
const TERMINAL_READ_SIZE: usize = 4 << 10;

/// The maximum number of chunks that a pump moves in one turn, before other pumps run.
const MAX_CHUNKS_PER_TURN: usize = 16;

/// The maximum number of bytes that are read from a terminal when its process ends. The kernel does not buffer more
/// than this for a terminal.
const MAX_TERMINAL_BACKLOG: usize = 128 << 10;

/// The result of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing can be moved until a descriptor becomes ready.
    Waiting,
    /// The turn is used up; there may be more to move.
    More,
    /// The stream has ended, and the pump has closed its descriptors.
    Ended,
}

/// The kind of the process's end, which decides how bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProcessSide {
    /// A pipe: splice(2) moves the bytes.
    Pipe,
    /// A terminal, which splice(2) does not support: the bytes are copied through `pending`.
    Terminal,
}

/// Moves the bytes of one standard stream in one direction.
#[derive(Debug)]
pub(crate) struct Pump {
    /// `None` once the stream has ended.
    ends: Option<Ends>,
    process_side: ProcessSide,
    /// Bytes that were read and not yet written.
    pending: Vec<u8>,
    /// The number of bytes that were read from the source.
    bytes_read: u64,
}

#[derive(Debug)]
struct Ends {
    source: OwnedFd,
    sink: OwnedFd,
    /// The end that is the stream to the host.
    host_side: HostSide,
    /// The source has ended; only `pending` is left to write.
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
            bytes_read: 0,
        }
    }

    /// Creates a pump from the host to the pipe of standard input.
    pub(crate) fn input(stream: OwnedFd, pipe: OwnedFd) -> Self {
        Self::new(stream, pipe, HostSide::Source, ProcessSide::Pipe)
    }

    /// Creates a pump from the pipe of standard output or error to the host.
    pub(crate) fn output(pipe: OwnedFd, stream: OwnedFd) -> Self {
        Self::new(pipe, stream, HostSide::Sink, ProcessSide::Pipe)
    }

    /// Creates a pump from the host to the master of a terminal.
    pub(crate) fn terminal_input(stream: OwnedFd, terminal: OwnedFd) -> Self {
        Self::new(stream, terminal, HostSide::Source, ProcessSide::Terminal)
    }

    /// Creates a pump from the master of a terminal to the host.
    pub(crate) fn terminal_output(terminal: OwnedFd, stream: OwnedFd) -> Self {
        Self::new(terminal, stream, HostSide::Sink, ProcessSide::Terminal)
    }

    /// Returns source and sink, whose readiness the event loop watches. `None` once the stream has ended.
    pub(crate) fn descriptors(&self) -> Option<[BorrowedFd<'_>; 2]> {
        let ends = self.ends.as_ref()?;
        Some([ends.source.as_fd(), ends.sink.as_fd()])
    }

    /// Whether source and sink are closed, so that no turn is needed.
    pub(crate) fn is_ended(&self) -> bool {
        self.ends.is_none()
    }

    /// Runs one turn: moves bytes until a descriptor would block, the stream ends or the turn is used up.
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
                    return if self.is_sink_gone() {
                        self.close()
                    } else {
                        Progress::Waiting
                    };
                }
                Err(Errno::INTR) => {}
                // EPIPE, ECONNRESET: the reader is gone. EIO: the last user of the terminal is gone.
                Err(_) => return self.close(),
            }
        }
        Progress::More
    }

    /// Moves one chunk. Returns `false` at the end of the source.
    fn splice(&mut self) -> Result<bool, Errno> {
        let Some(ends) = &self.ends else { return Ok(false) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = rustix::pipe::splice(&ends.source, None, &ends.sink, None, MAX_CHUNK, flags)?;
        self.bytes_read += moved as u64;
        Ok(moved > 0)
    }

    /// Reads or writes once. Returns `false` when the source has ended and everything has been written.
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

    /// Reads once into `pending`, or sets `source_ended`.
    fn read_pending(&mut self) -> Result<(), Errno> {
        let Some(ends) = &mut self.ends else { return Ok(()) };
        if ends.source_ended {
            return Ok(());
        }
        self.pending.reserve(TERMINAL_READ_SIZE);
        match rustix::io::read(&ends.source, rustix::buffer::spare_capacity(&mut self.pending)) {
            Ok(0) | Err(Errno::IO) => ends.source_ended = true,
            Ok(read) => self.bytes_read += read as u64,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether the sink cannot accept data any more: the last reader of standard input is gone, or the host has closed
    /// the stream. The host never shuts down only one direction of an output stream.
    fn is_sink_gone(&self) -> bool {
        let Some(ends) = &self.ends else { return true };
        let gone = match (ends.host_side, self.process_side) {
            (HostSide::Sink, _) => PollFlags::ERR | PollFlags::HUP | PollFlags::RDHUP,
            (HostSide::Source, ProcessSide::Pipe) => PollFlags::ERR,
            // A process may open the terminal again.
            (HostSide::Source, ProcessSide::Terminal) => return false,
        };
        let mut poll = [PollFd::new(&ends.sink, PollFlags::RDHUP)];
        rustix::event::poll(&mut poll, Some(&Timespec::default())).is_ok() && poll[0].revents().intersects(gone)
    }

    /// Returns the number of bytes that the process and its children have written. Call this when the process has
    /// ended: bytes in the buffer of a terminal cannot be counted, so this reads them into `pending` first.
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
            return self.bytes_read;
        }
        let waiting = self
            .ends
            .as_ref()
            .and_then(|ends| rustix::io::ioctl_fionread(&ends.source).ok())
            .unwrap_or(0);
        self.bytes_read + waiting
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
    fn bytes_written_includes_bytes_in_the_pipe() {
        let (reader, writer) = pipe();
        let (ours, _host) = stream();
        let mut pump = Pump::output(reader, ours);
        let mut written = 0;
        // The host reads nothing, so the stream fills up, then the pipe.
        loop {
            while let Ok(count) = rustix::io::write(&writer, &[b'x'; 4096]) {
                written += count as u64;
            }
            let before = pump.bytes_read;
            pump.transfer();
            if pump.bytes_read == before {
                break;
            }
        }
        assert!(pump.bytes_read > 0 && pump.bytes_read < written);

        assert_eq!(pump.bytes_written(), written);
    }

    #[test]
    fn input_ends_when_the_host_shuts_it_down() {
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
    fn input_ends_when_its_last_reader_is_gone() {
        let (reader, writer) = pipe();
        let (ours, _host) = stream();
        let mut pump = Pump::input(ours, writer);
        assert_eq!(pump.transfer(), Progress::Waiting);
        drop(reader);
        assert_eq!(pump.transfer(), Progress::Ended);
    }

    #[test]
    fn output_ends_when_the_host_closes_the_stream() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        drop(host);
        rustix::io::write(&writer, b"lost").unwrap();
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn silent_output_ends_when_the_host_closes_the_stream() {
        let (reader, writer) = pipe();
        let (ours, host) = stream();
        let mut pump = Pump::output(reader, ours);
        assert_eq!(pump.transfer(), Progress::Waiting);
        drop(host);
        assert_eq!(pump.transfer(), Progress::Ended);
        assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn turn_is_limited_for_endless_output() {
        let zero = rustix::fs::open("/dev/zero", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty()).unwrap();
        let mut pump = Pump::terminal_output(zero, null);
        assert_eq!(pump.transfer(), Progress::More);
        assert!(pump.bytes_read > 0);
    }
}
