//! The process's side of its standard streams.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nutshell_protocol::Stdio;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use super::Pump;
use crate::connection::{HostAddress, await_connection};

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
    pub(crate) fn set_owner(&self, uid: u32) -> io::Result<()> {
        for (end, _) in self.ends.iter().zip(self.pipes).filter(|(_, pipe)| *pipe) {
            rustix::fs::fchown(end, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        }
        Ok(())
    }
}

/// What the standard streams are called in errors.
const STREAM_NAMES: [&str; 3] = ["standard input", "standard output", "standard error"];

/// The agent's side of a process's standard streams, before the process exists.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    /// The streams to the host: standard input, output and error.
    streams: [Option<OwnedFd>; 3],
    /// Our ends of the process's pipes; none with a terminal.
    pipes: [Option<OwnedFd>; 3],
}

impl AgentEnds {
    /// Dials the host's streams and makes what a process is connected to.
    pub(crate) fn open(host: &HostAddress, stdio: &Stdio) -> io::Result<(Self, ProcessEnds)> {
        let mut agent_ends = Self {
            streams: [None, None, None],
            pipes: [None, None, None],
        };
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let mut ends = [null.try_clone()?, null.try_clone()?, null];
        let mut pipes = [false; 3];
        for (index, port) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
            let Some(port) = port else { continue };
            agent_ends.streams[index] = Some(host.dial(port).map_err(|error| refused(STREAM_NAMES[index], &error))?);
            if stdio.terminal {
                continue;
            }
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (ours, theirs) = if index == 0 { (writer, reader) } else { (reader, writer) };
            rustix::io::ioctl_fionbio(&ours, true)?;
            agent_ends.pipes[index] = Some(ours);
            ends[index] = theirs;
            pipes[index] = true;
        }
        Ok((agent_ends, ProcessEnds { ends, pipes }))
    }

    /// The pumps of a process without terminal, or those of `terminal`. The host has answered long ago,
    /// while the process was made; a stream that it refused is an error.
    pub(crate) fn into_pumps(self, terminal: Option<&OwnedFd>) -> io::Result<[Option<Pump>; 3]> {
        for (stream, name) in self.streams.iter().zip(STREAM_NAMES) {
            if let Some(stream) = stream {
                await_connection(stream).map_err(|error| refused(name, &error))?;
            }
        }
        let [stdin, stdout, stderr] = self.streams;
        if let Some(terminal) = terminal {
            rustix::io::ioctl_fionbio(terminal, true)?;
            let terminal_input =
                stdin.map(|stream| Ok::<_, io::Error>(Pump::terminal_input(stream, terminal.try_clone()?)));
            let terminal_output =
                stdout.map(|stream| Ok::<_, io::Error>(Pump::terminal_output(terminal.try_clone()?, stream)));
            return Ok([terminal_input.transpose()?, terminal_output.transpose()?, None]);
        }
        let [input, output, error] = self.pipes;
        Ok([
            stdin.zip(input).map(|(stream, pipe)| Pump::input(stream, pipe)),
            stdout.zip(output).map(|(stream, pipe)| Pump::output(pipe, stream)),
            stderr.zip(error).map(|(stream, pipe)| Pump::output(pipe, stream)),
        ])
    }
}

fn refused(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the host refused the stream of {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    const ALL: Stdio = Stdio {
        stdin: Some(1024),
        stdout: Some(1025),
        stderr: Some(1026),
        terminal: false,
        size: None,
    };

    /// A host that listens on some ports.
    struct Listening {
        folder: PathBuf,
        host: HostAddress,
        _listeners: Vec<UnixListener>,
    }

    impl Listening {
        fn on(test: &str, ports: &[u32]) -> Self {
            let folder = std::env::temp_dir().join(format!("agent_ends-{test}-{}", std::process::id()));
            fs::create_dir(&folder).unwrap();
            let bind = |port: &u32| UnixListener::bind(folder.join(port.to_string())).unwrap();
            Self {
                host: HostAddress::Unix(folder.clone()),
                _listeners: ports.iter().map(bind).collect(),
                folder,
            }
        }
    }

    impl Drop for Listening {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.folder).unwrap();
        }
    }

    #[test]
    fn stream_that_nobody_listens_for_is_named() {
        let listening = Listening::on("missing", &[1024, 1026]);
        let error = AgentEnds::open(&listening.host, &ALL).unwrap_err().to_string();
        assert!(
            error.starts_with("the host refused the stream of standard output: "),
            "{error}"
        );
    }

    #[test]
    fn stream_that_is_refused_after_the_dial_is_an_error() {
        let listening = Listening::on("refused", &[1024, 1025, 1026]);
        let (mut agent_ends, _ends) = AgentEnds::open(&listening.host, &ALL).unwrap();
        // What a socket is whose connection was refused, once its error was taken: not connected.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        agent_ends.streams[2] = Some(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap());
        let error = agent_ends.into_pumps(None).unwrap_err().to_string();
        assert!(
            error.starts_with("the host refused the stream of standard error: "),
            "{error}"
        );

        let (agent_ends, _ends) = AgentEnds::open(&listening.host, &ALL).unwrap();
        assert!(agent_ends.into_pumps(None).unwrap().iter().all(Option::is_some));
    }
}
