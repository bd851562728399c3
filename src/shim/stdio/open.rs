//! Opens the standard streams of a process and hands them to the machine.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nutshell_protocol::Stdio;

use super::{
    console::ConsoleStreams,
    endpoint::{Endpoint, EndpointError, Program},
    error::StdioError,
    files::{self, InputEnds, OppositeEnd, OutputEnds},
    logger::{LogSource, Logger},
    standard::{HostReader, HostWriter, OutputStream, StandardStreams},
    streaming::{Relay, StreamRegistry, StreamingError},
};
use crate::{
    control::ControlError,
    shim::{blocking, machine::Machine},
};

/// The settings that the streams of all processes of this shim share.
#[derive(Debug, Clone, Default)]
pub(crate) struct StdioContext {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The streams that clients open at the shim's socket.
    pub(crate) streaming: StreamRegistry,
}

/// The streams that containerd requests for a process. Each is a path or a URI (see [`Endpoint`]), or empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StdioSpec {
    pub(crate) stdin: String,
    /// Standard output; all output with a terminal.
    pub(crate) stdout: String,
    /// Standard error; ignored with a terminal.
    pub(crate) stderr: String,
    /// The process has a terminal.
    pub(crate) terminal: bool,
}

/// The opened streams of a process, before the machine has them.
#[derive(Debug)]
pub(crate) struct OpenedStreams {
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    loggers: Vec<Logger>,
}

#[derive(Debug)]
struct Input {
    /// The machine's end.
    machine: OwnedFd,
    writer: HostWriter,
}

#[derive(Debug)]
struct Output {
    /// The machine's end.
    machine: OwnedFd,
    reader: HostReader,
}

impl StdioSpec {
    /// Opens all streams of a process. `id` is that of its container or exec. Waits until logging programs are ready
    /// and until clients have opened streams of the streaming scheme, but not for the other end of a fifo.
    pub(crate) async fn open(&self, id: &str, context: &StdioContext) -> Result<OpenedStreams, StdioError> {
        let stdin = Endpoint::parse("stdin", &self.stdin)?;
        let stdout = Endpoint::parse("stdout", &self.stdout)?;
        let stderr = match self.terminal {
            true => None,
            false => Endpoint::parse("stderr", &self.stderr)?
                .or_else(|| stdout.clone().filter(Endpoint::is_default_for_stderr)),
        };
        let OpenedFiles {
            stdin: stdin_file,
            stdout: stdout_file,
            stderr: stderr_file,
        } = open_files(stdin.as_ref(), stdout.as_ref(), stderr.as_ref()).await?;
        let stdin = match stdin {
            Some(endpoint) => Some(self.open_input(endpoint, stdin_file, context).await?),
            None => None,
        };
        let source = LogSource {
            id,
            namespace: &context.namespace,
        };
        let mut loggers = Vec::new();
        let mut pipes = [None, None];
        for (program, wanted) in logging_programs(stdout.as_ref(), stderr.as_ref()) {
            let (logger, opened) = Logger::start(program, source, wanted).await?;
            loggers.push(logger);
            for (pipe, opened) in pipes.iter_mut().zip(opened) {
                *pipe = opened.or(pipe.take());
            }
        }
        let [stdout_pipe, stderr_pipe] = pipes;
        Ok(OpenedStreams {
            terminal: self.terminal,
            stdin,
            stdout: open_output("stdout", stdout, stdout_file, stdout_pipe, context).await?,
            stderr: open_output("stderr", stderr, stderr_file, stderr_pipe, context).await?,
            loggers,
        })
    }

    /// Closes the streams that clients have opened for a process that is not created: no process will use them.
    pub(crate) fn close_unused(&self, registry: &StreamRegistry) {
        for (name, uri) in [
            ("stdin", &self.stdin),
            ("stdout", &self.stdout),
            ("stderr", &self.stderr),
        ] {
            if let Ok(Some(Endpoint::Streaming(id))) = Endpoint::parse(name, uri) {
                registry.close(&id);
            }
        }
    }

    /// Opens the input, or takes its `file` if it has one.
    async fn open_input(
        &self,
        endpoint: Endpoint,
        file: Option<InputEnds>,
        context: &StdioContext,
    ) -> Result<Input, StdioError> {
        if let Some(InputEnds { machine, writer }) = file {
            return Ok(Input {
                machine,
                writer: HostWriter::Fifo { _writer: writer },
            });
        }
        match endpoint {
            Endpoint::Streaming(id) => {
                let relay = Relay::start_input(&context.streaming, &id).await;
                let (relay, machine) = relay.map_err(streaming_error("stdin", &id))?;
                Ok(Input {
                    machine,
                    writer: HostWriter::Relay(relay),
                })
            }
            Endpoint::Fifo(_) | Endpoint::File(_) | Endpoint::Program(_) => Err(StdioError::Endpoint(EndpointError {
                stream: "stdin",
                uri: self.stdin.clone(),
                reason: "input must come from a fifo or a stream".to_owned(),
            })),
        }
    }
}

/// The programs to start, each with the streams that it reads: standard output, standard error. A program that is named
/// for both is started once.
fn logging_programs<'a>(stdout: Option<&'a Endpoint>, stderr: Option<&'a Endpoint>) -> Vec<(&'a Program, [bool; 2])> {
    let program = |endpoint: Option<&'a Endpoint>| match endpoint {
        Some(Endpoint::Program(program)) => Some(program),
        _ => None,
    };
    match (program(stdout), program(stderr)) {
        (Some(stdout), Some(stderr)) if stdout == stderr => vec![(stdout, [true, true])],
        (stdout, stderr) => {
            let stdout = stdout.map(|program| (program, [true, false]));
            let stderr = stderr.map(|program| (program, [false, true]));
            stdout.into_iter().chain(stderr).collect()
        }
    }
}

/// Opens an output, or takes its `file`, or the `pipe` to its logging program, if it has one.
async fn open_output(
    stream: &'static str,
    endpoint: Option<Endpoint>,
    file: Option<OutputEnds>,
    pipe: Option<OwnedFd>,
    context: &StdioContext,
) -> Result<Option<Output>, StdioError> {
    if let Some(OutputEnds { machine, opposite }) = file {
        let reader = match opposite {
            OppositeEnd::Fifo(reader) => HostReader::Direct { _reader: Some(reader) },
            OppositeEnd::File(writer) => HostReader::File(writer),
            OppositeEnd::None => HostReader::Direct { _reader: None },
        };
        return Ok(Some(Output { machine, reader }));
    }
    Ok(match endpoint {
        None | Some(Endpoint::Fifo(_) | Endpoint::File(_)) => None,
        Some(Endpoint::Program(_)) => pipe.map(|machine| Output {
            machine,
            reader: HostReader::Direct { _reader: None },
        }),
        Some(Endpoint::Streaming(id)) => {
            let relay = Relay::start_output(&context.streaming, &id).await;
            let (relay, machine) = relay.map_err(streaming_error(stream, &id))?;
            Some(Output {
                machine,
                reader: HostReader::Relay(relay),
            })
        }
    })
}

impl OpenedStreams {
    /// Hands the streams to `machine`. Returns them with their vsock ports on the host, which the agent needs. `size`
    /// is that of the terminal: columns, rows.
    pub(crate) async fn connect(
        self,
        machine: &Machine,
        size: Option<(u16, u16)>,
    ) -> Result<(StandardStreams, Stdio), ControlError> {
        let mut ports = Stdio {
            terminal: self.terminal,
            size,
            ..Stdio::default()
        };
        let mut stdin = None;
        if let Some(Input { machine: end, writer }) = self.stdin {
            let stream = machine.open_stream(Some(end.as_fd()), None).await?;
            ports.stdin = Some(stream.port());
            stdin = Some((stream, writer));
        }
        let stdout = connect_output(self.stdout, machine).await?;
        let stderr = connect_output(self.stderr, machine).await?;
        ports.stdout = stdout.as_ref().map(OutputStream::port);
        ports.stderr = stderr.as_ref().map(OutputStream::port);
        Ok((StandardStreams::new(stdin, stdout, stderr, self.loggers), ports))
    }
}

impl OpenedStreams {
    /// The streams as the console of a virtual machine. Standard error stays unused.
    ///
    /// # Errors
    ///
    /// The errors of fcntl(2).
    pub(crate) fn into_console(self) -> io::Result<ConsoleStreams> {
        let non_blocking = |end: &OwnedFd| -> io::Result<()> {
            let flags = rustix::fs::fcntl_getfl(end)?;
            Ok(rustix::fs::fcntl_setfl(end, flags | rustix::fs::OFlags::NONBLOCK)?)
        };
        for end in [
            self.stdin.as_ref().map(|input| &input.machine),
            self.stdout.as_ref().map(|output| &output.machine),
        ] {
            end.map_or(Ok(()), non_blocking)?;
        }
        let (input, output, _, loggers) = self.into_ends();
        Ok(ConsoleStreams::new(input, output, loggers))
    }

    /// Returns the streams, each as the machine's end and the host's: input, output, standard error.
    #[expect(clippy::type_complexity, reason = "it is taken apart at once")]
    pub(super) fn into_ends(
        self,
    ) -> (
        Option<(OwnedFd, HostWriter)>,
        Option<(OwnedFd, HostReader)>,
        Option<(OwnedFd, HostReader)>,
        Vec<Logger>,
    ) {
        let output = |output: Option<Output>| output.map(|Output { machine, reader }| (machine, reader));
        (
            self.stdin.map(|Input { machine, writer }| (machine, writer)),
            output(self.stdout),
            output(self.stderr),
            self.loggers,
        )
    }
}

async fn connect_output(output: Option<Output>, machine: &Machine) -> Result<Option<OutputStream>, ControlError> {
    let Some(Output { machine: end, reader }) = output else {
        return Ok(None);
    };
    let stream = machine.open_stream(None, Some(end.as_fd())).await?;
    Ok(Some(OutputStream { stream, reader }))
}

/// The fifos and files among the standard streams.
#[derive(Debug, Default)]
struct OpenedFiles {
    stdin: Option<InputEnds>,
    stdout: Option<OutputEnds>,
    stderr: Option<OutputEnds>,
}

/// Opens the fifos and files among the endpoints. Their file systems may hang.
async fn open_files(
    stdin: Option<&Endpoint>,
    stdout: Option<&Endpoint>,
    stderr: Option<&Endpoint>,
) -> Result<OpenedFiles, StdioError> {
    type OpenOutput = fn(&Path) -> io::Result<OutputEnds>;
    let output = |endpoint: Option<&Endpoint>| match endpoint? {
        Endpoint::Fifo(path) => Some((path.clone(), files::open_output as OpenOutput)),
        Endpoint::File(path) => Some((path.clone(), files::open_log as OpenOutput)),
        Endpoint::Program(_) | Endpoint::Streaming(_) => None,
    };
    let stdin = match stdin {
        Some(Endpoint::Fifo(path)) => Some(path.clone()),
        _ => None,
    };
    let (stdout, stderr) = (output(stdout), output(stderr));
    let paths = [
        ("stdin", stdin.as_ref()),
        ("stdout", stdout.as_ref().map(|(path, _)| path)),
        ("stderr", stderr.as_ref().map(|(path, _)| path)),
    ];
    let Some((stream, path)) = paths
        .into_iter()
        .find_map(|(stream, path)| Some((stream, path?.clone())))
    else {
        return Ok(OpenedFiles::default());
    };
    // All in one step, because each change of the thread costs time.
    let opened = blocking::run("open it", move || {
        let failed = |stream, path: &Path| {
            let path = path.to_owned();
            move |source| StdioError::Open { stream, path, source }
        };
        let open_output = |stream, output: Option<(PathBuf, OpenOutput)>| {
            let opened = output.map(|(path, open)| open(&path).map_err(failed(stream, &path)));
            opened.transpose()
        };
        let stdin = stdin.map(|path| files::open_input(&path).map_err(failed("stdin", &path)));
        Ok(OpenedFiles {
            stdin: stdin.transpose()?,
            stdout: open_output("stdout", stdout)?,
            stderr: open_output("stderr", stderr)?,
        })
    });
    opened.await.unwrap_or_else(|error| {
        let source = io::Error::other(error);
        Err(StdioError::Open { stream, path, source })
    })
}

fn streaming_error<'a>(stream: &'static str, id: &'a str) -> impl FnOnce(StreamingError) -> StdioError + use<'a> {
    move |source| StdioError::Streaming {
        stream,
        id: id.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Write,
    };

    use super::*;

    async fn open(spec: StdioSpec) -> Result<OpenedStreams, StdioError> {
        spec.open("c1", &StdioContext::default()).await
    }

    async fn write(output: Option<Output>, text: &str) {
        let Output { machine, reader } = output.unwrap();
        File::from(machine).write_all(text.as_bytes()).unwrap();
        reader.ended().await;
    }

    #[tokio::test]
    async fn terminal_has_no_standard_error() {
        let folder = tempfile::tempdir().unwrap();
        let opened = open(StdioSpec {
            stdout: format!("file://{}", folder.path().join("log").display()),
            stderr: "/no/such/fifo".to_owned(),
            terminal: true,
            ..StdioSpec::default()
        });
        let opened = opened.await.unwrap();
        assert!(opened.stdout.is_some());
        assert!(opened.stderr.is_none());
    }

    #[tokio::test]
    async fn log_file_is_created_with_its_parents_and_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("deep/er/log");
        for text in ["a", "b"] {
            let opened = open(StdioSpec {
                stdout: format!("file://{}", log.display()),
                terminal: true,
                ..StdioSpec::default()
            });
            write(opened.await.unwrap().stdout, text).await;
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "ab");
    }

    #[tokio::test]
    async fn both_outputs_go_to_one_file_named_once_or_twice() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let uri = format!("file://{}", log.display());
        for stderr in [uri.clone(), String::new()] {
            let opened = open(StdioSpec {
                stdout: uri.clone(),
                stderr,
                ..StdioSpec::default()
            });
            let opened = opened.await.unwrap();
            write(opened.stdout, "out ").await;
            write(opened.stderr, "err ").await;
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "out err out err ");
    }

    #[test]
    fn logging_program_that_is_named_twice_is_started_once() {
        let endpoint = |uri| Endpoint::parse("stdout", uri).unwrap();
        let [one, same] = ["binary:///a?x=y"; 2].map(endpoint);
        let (other, fifo) = (endpoint("binary:///b"), endpoint("/fifo"));
        let started = |stdout, stderr| {
            let programs = logging_programs(stdout, stderr);
            programs.into_iter().map(|(_, wanted)| wanted).collect::<Vec<_>>()
        };
        assert_eq!(started(one.as_ref(), same.as_ref()), [[true, true]]);
        assert_eq!(started(one.as_ref(), other.as_ref()), [[true, false], [false, true]]);
        assert_eq!(started(None, other.as_ref()), [[false, true]]);
        assert_eq!(started(fifo.as_ref(), None), Vec::<[bool; 2]>::new());
    }

    #[tokio::test]
    async fn error_names_the_stream_and_its_endpoint() {
        let error = open(StdioSpec {
            stdout: "/no/such/fifo".to_owned(),
            ..StdioSpec::default()
        });
        let error = error.await.unwrap_err().to_string();
        assert!(error.starts_with("cannot open stdout /no/such/fifo: "), "{error}");

        let error = open(StdioSpec {
            stdin: "file:///etc/passwd".to_owned(),
            ..StdioSpec::default()
        });
        let error = error.await.unwrap_err().to_string();
        assert!(error.starts_with("stdin file:///etc/passwd: "), "{error}");
    }
}
