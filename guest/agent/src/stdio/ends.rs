//! Creates the two sides of a process's standard streams: descriptors for the process, and pumps for the agent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nutshell_protocol::Stdio;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use super::Pump;
use crate::connection::{HostAddress, await_connection};

/// The descriptors that a process gets as 0, 1 and 2, unless it has a terminal.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    /// For standard input, output and error.
    pub(crate) ends: [OwnedFd; 3],
    /// Whether each of them is a pipe, and not `/dev/null`.
    pub(crate) pipes: [bool; 3],
}

impl ProcessEnds {
    /// Returns the descriptors, which a job must keep open to create the process.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.ends[0].as_fd(), self.ends[1].as_fd(), self.ends[2].as_fd()]
    }

    /// Makes `uid` the owner of the pipes, so that a process that is not root can open its `/dev/stdout`.
    pub(crate) fn set_owner(&self, uid: u32) -> io::Result<()> {
        for (end, _) in self.ends.iter().zip(self.pipes).filter(|(_, pipe)| *pipe) {
            rustix::fs::fchown(end, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        }
        Ok(())
    }
}

/// The names of the standard streams in error texts.
const STREAM_NAMES: [&str; 3] = ["standard input", "standard output", "standard error"];

/// The agent's descriptors for a process's standard streams, until the process exists and pumps take them over.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    /// The streams to the host: standard input, output and error.
    streams: [Option<OwnedFd>; 3],
    /// The agent's ends of the process's pipes; none if it has a terminal.
    pipes: [Option<OwnedFd>; 3],
}

impl AgentEnds {
    /// Starts to connect the streams to the host, and creates the pipes of the process.
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

    /// Returns the streams to the host, which a job must keep open to wait for them.
    pub(crate) fn streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.streams.iter().flatten().map(AsFd::as_fd)
    }

    /// Waits until the streams are connected. Fails if the host refuses one or does not answer. Call this in a job.
    pub(crate) fn await_connections(&self) -> io::Result<()> {
        for (stream, name) in self.streams.iter().zip(STREAM_NAMES) {
            if let Some(stream) = stream {
                await_connection(stream).map_err(|error| refused(name, &error))?;
            }
        }
        Ok(())
    }

    /// Creates the pumps of the process: those of `terminal` if it has one, else those of its pipes. Call this when the
    /// streams are connected; a stream that the host has closed meanwhile ends its pump.
    pub(crate) fn into_pumps(self, terminal: Option<&OwnedFd>) -> io::Result<[Option<Pump>; 3]> {
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
    use std::net::{Ipv4Addr, SocketAddrV4};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    const ALL: Stdio = Stdio {
        stdin: Some(1024),
        stdout: Some(1025),
        stderr: Some(1026),
        terminal: false,
        size: None,
    };

    /// A host that listens on some ports, as Unix sockets in a directory.
    struct ListeningHost {
        directory: PathBuf,
        address: HostAddress,
        _listeners: Vec<UnixListener>,
    }

    impl ListeningHost {
        fn on(test: &str, ports: &[u32]) -> Self {
            let directory = std::env::temp_dir().join(format!("agent_ends-{test}-{}", std::process::id()));
            fs::create_dir(&directory).unwrap();
            let bind = |port: &u32| UnixListener::bind(directory.join(port.to_string())).unwrap();
            Self {
                address: HostAddress::Unix(directory.clone()),
                _listeners: ports.iter().map(bind).collect(),
                directory,
            }
        }
    }

    impl Drop for ListeningHost {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    #[test]
    fn error_names_the_stream_without_a_listener() {
        let listening_host = ListeningHost::on("missing", &[1024, 1026]);
        let error = AgentEnds::open(&listening_host.address, &ALL).unwrap_err().to_string();
        assert!(
            error.starts_with("the host refused the stream of standard output: "),
            "{error}"
        );
    }

    #[test]
    fn stream_that_is_refused_while_connecting_is_an_error() {
        let listening_host = ListeningHost::on("refused", &[1024, 1025, 1026]);
        let (mut agent_ends, _ends) = AgentEnds::open(&listening_host.address, &ALL).unwrap();
        agent_ends.await_connections().unwrap();
        // Like a socket whose connection was refused and whose error has been read, this one is not connected.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        agent_ends.streams[2] = Some(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap());
        let error = agent_ends.await_connections().unwrap_err().to_string();
        assert!(
            error.starts_with("the host refused the stream of standard error: "),
            "{error}"
        );
    }

    /// Returns a socket that stays in the middle of connecting, and the listener that causes it.
    fn connecting_socket() -> (OwnedFd, [OwnedFd; 2]) {
        let any = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let socket = |flags| socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let listener = socket(SocketFlags::CLOEXEC);
        rustix::net::bind(&listener, &any).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = rustix::net::getsockname(&listener).unwrap();
        let first = socket(SocketFlags::CLOEXEC);
        rustix::net::connect(&first, &address).unwrap();
        // The backlog is full now.
        let second = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let result = rustix::net::connect(&second, &address);
        assert_eq!(result, Err(rustix::io::Errno::INPROGRESS));
        (second, [listener, first])
    }

    #[test]
    fn creation_of_pumps_does_not_wait_for_a_stream() {
        let listening_host = ListeningHost::on("connecting", &[1024, 1025, 1026]);
        let (mut agent_ends, _ends) = AgentEnds::open(&listening_host.address, &ALL).unwrap();
        let (socket, _listener) = connecting_socket();
        agent_ends.streams[1] = Some(socket);
        assert!(agent_ends.into_pumps(None).unwrap().iter().all(Option::is_some));
    }
}
