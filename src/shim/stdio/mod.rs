//! The standard streams of a process on the host: what containerd names, opened and handed to the
//! machine.
//!
//! Lives here: what a name means ([`endpoint`]), fifos and files ([`files`]), logging programs
//! ([`logger`]), containerd's streaming scheme ([`streaming`]), and here all streams of one process. May
//! not live here: when a process starts or ends (that is [`super::tasks`], the one caller).
//!
//! Bytes go between the machine and a fifo, file or pipe directly; only those of the streaming scheme
//! pass through the shim, one message at a time.
//!
//! Of each fifo the shim keeps an end of its own. Of standard output and error the reading one:
//! a reader that goes away (containerd restarts) is no error for the process, which waits for the
//! next reader as it would for a slow one. Of standard input the writing one: a client that detaches
//! is no end of input, only [`StandardStreams::close_stdin`] is (containerd `pkg/cio`, and the runc shim's
//! `process/io.go`).

mod endpoint;
mod files;
mod logger;
mod streaming;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use parking_lot::Mutex;

use nutshell_protocol::Stdio;

pub(crate) use self::streaming::{STREAMING_SERVICE, StreamRegistry};
use self::{
    endpoint::{Endpoint, Program},
    files::Ends,
    logger::{Logger, LoggerError, Owner},
    streaming::{Relay, StreamingError},
};
use super::machine::{GuestStream, Machine};
use crate::control::ControlError;

/// Why a process has no standard streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// The name is of no kind that is known.
    #[error("{stream} {uri}: {reason}")]
    Unsupported {
        /// Which stream.
        stream: &'static str,
        /// What containerd named.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The fifo or file cannot be opened.
    #[error("open {stream} {}: {source}", path.display())]
    Open {
        /// Which stream.
        stream: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no logging program.
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// There is no client.
    #[error("open {stream} with streaming_id {id}: {source}")]
    Streaming {
        /// Which stream.
        stream: &'static str,
        /// Its id.
        id: String,
        /// Why.
        source: StreamingError,
    },
}

/// What all streams of this shim have in common.
#[derive(Debug, Clone, Default)]
pub(crate) struct StdioContext {
    /// containerd's namespace of all containers of this shim.
    pub(crate) namespace: String,
    /// Where clients open streams.
    pub(crate) streaming: StreamRegistry,
}

/// What containerd asks for: paths or URIs, empty where there is no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StdioSpec {
    /// Standard input.
    pub(crate) stdin: String,
    /// Standard output, or all of a terminal's.
    pub(crate) stdout: String,
    /// Standard error; not used with a terminal.
    pub(crate) stderr: String,
    /// The process has a terminal.
    pub(crate) terminal: bool,
}

/// Streams that are open and not yet the machine's.
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
    machine: OwnedFd,
    writer: Writer,
}

/// What keeps a standard input from its end.
#[derive(Debug)]
enum Writer {
    Fifo { _own: Option<File> },
    Relay(Relay),
}

#[derive(Debug)]
struct Output {
    machine: OwnedFd,
    reader: Reader,
}

/// What the shim has of the other side of an output.
#[derive(Debug)]
enum Reader {
    Own { _end: Option<File> },
    Relay(Relay),
}

/// The streams of a process in a machine.
#[derive(Debug, Default)]
pub(crate) struct StandardStreams {
    stdin: Option<GuestStream>,
    stdin_writer: Mutex<Option<Writer>>,
    stdout: Option<OutputStream>,
    stderr: Option<OutputStream>,
    loggers: Mutex<Vec<Logger>>,
}

#[derive(Debug)]
struct OutputStream {
    stream: GuestStream,
    reader: Reader,
}

impl StdioSpec {
    /// Opens all streams of `owner`, a container's or an exec's id. Waits only for what containerd has
    /// prepared before: the other end of a fifo may come later.
    pub(crate) async fn open(&self, owner: &str, context: &StdioContext) -> Result<OpenedStreams, StdioError> {
        let stdin = match Endpoint::parse("stdin", &self.stdin)? {
            Some(endpoint) => Some(self.open_input(endpoint, context).await?),
            None => None,
        };
        let stdout = Endpoint::parse("stdout", &self.stdout)?;
        let stderr = match self.terminal {
            true => None,
            false => Endpoint::parse("stderr", &self.stderr)?.or_else(|| stdout.clone().filter(Endpoint::takes_both)),
        };
        let owner = Owner {
            id: owner,
            namespace: &context.namespace,
        };
        let mut loggers = Vec::new();
        let mut pipes = [None, None];
        for (program, wanted) in programs(stdout.as_ref(), stderr.as_ref()) {
            let (logger, made) = Logger::start(program, owner, wanted).await?;
            loggers.push(logger);
            for (pipe, made) in pipes.iter_mut().zip(made) {
                *pipe = made.or(pipe.take());
            }
        }
        let [stdout_pipe, stderr_pipe] = pipes;
        Ok(OpenedStreams {
            terminal: self.terminal,
            stdin,
            stdout: open_output("stdout", stdout, stdout_pipe, context).await?,
            stderr: open_output("stderr", stderr, stderr_pipe, context).await?,
            loggers,
        })
    }

    async fn open_input(&self, endpoint: Endpoint, context: &StdioContext) -> Result<Input, StdioError> {
        match endpoint {
            Endpoint::Fifo(path) => {
                let Ends { machine, own } = files::open_input(&path).map_err(open_error("stdin", &path))?;
                Ok(Input {
                    machine: machine.into(),
                    writer: Writer::Fifo { _own: own },
                })
            }
            Endpoint::Streaming(id) => {
                let relay = Relay::input(&context.streaming, &id).await;
                let (relay, machine) = relay.map_err(streaming_error("stdin", &id))?;
                Ok(Input {
                    machine,
                    writer: Writer::Relay(relay),
                })
            }
            Endpoint::Log(_) | Endpoint::Program(_) => Err(StdioError::Unsupported {
                stream: "stdin",
                uri: self.stdin.clone(),
                reason: "input comes from a fifo or a stream".to_owned(),
            }),
        }
    }
}

/// The programs to start, each with the streams that it gets: one that is named twice is started once.
fn programs<'a>(stdout: Option<&'a Endpoint>, stderr: Option<&'a Endpoint>) -> Vec<(&'a Program, [bool; 2])> {
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

async fn open_output(
    stream: &'static str,
    endpoint: Option<Endpoint>,
    pipe: Option<OwnedFd>,
    context: &StdioContext,
) -> Result<Option<Output>, StdioError> {
    let of_file = |Ends { machine, own }| Output {
        machine: machine.into(),
        reader: Reader::Own { _end: own },
    };
    Ok(match endpoint {
        None => None,
        Some(Endpoint::Fifo(path)) => Some(of_file(files::open_output(&path).map_err(open_error(stream, &path))?)),
        Some(Endpoint::Log(path)) => Some(of_file(files::open_log(&path).map_err(open_error(stream, &path))?)),
        Some(Endpoint::Program(_)) => pipe.map(|machine| Output {
            machine,
            reader: Reader::Own { _end: None },
        }),
        Some(Endpoint::Streaming(id)) => {
            let relay = Relay::output(&context.streaming, &id).await;
            let (relay, machine) = relay.map_err(streaming_error(stream, &id))?;
            Some(Output {
                machine,
                reader: Reader::Relay(relay),
            })
        }
    })
}

impl OpenedStreams {
    /// Hands the streams to `machine`; the second value is for the agent.
    pub(crate) async fn connect(
        self,
        machine: &Machine,
        size: Option<(u16, u16)>,
    ) -> Result<(StandardStreams, Stdio), ControlError> {
        let mut stdio = Stdio {
            terminal: self.terminal,
            size,
            ..Stdio::default()
        };
        let mut standard = StandardStreams {
            loggers: Mutex::new(self.loggers),
            ..StandardStreams::default()
        };
        if let Some(input) = self.stdin {
            let stream = machine.open_stream(Some(input.machine.as_fd()), None).await?;
            stdio.stdin = Some(stream.port());
            standard.stdin = Some(stream);
            standard.stdin_writer = Mutex::new(Some(input.writer));
        }
        (standard.stdout, stdio.stdout) = hand_over(self.stdout, machine).await?;
        (standard.stderr, stdio.stderr) = hand_over(self.stderr, machine).await?;
        Ok((standard, stdio))
    }
}

async fn hand_over(
    output: Option<Output>,
    machine: &Machine,
) -> Result<(Option<OutputStream>, Option<u32>), ControlError> {
    let Some(Output { machine: end, reader }) = output else {
        return Ok((None, None));
    };
    let stream = machine.open_stream(None, Some(end.as_fd())).await?;
    let port = stream.port();
    Ok((Some(OutputStream { stream, reader }), Some(port)))
}

impl StandardStreams {
    /// Ends the input once what was sent before was read and no client writes any more.
    pub(crate) fn close_stdin(&self) {
        let mut writer = self.stdin_writer.lock();
        match &*writer {
            Some(Writer::Relay(relay)) => relay.end_input(),
            Some(Writer::Fifo { .. }) => *writer = None,
            None => {}
        }
    }

    /// Waits until the first `stdout` and `stderr` bytes reached their readers, at most `limit`:
    /// a reader that does not read must not hide the end of the process. The rest is delivered later.
    pub(crate) async fn drained(&self, machine: &Machine, stdout: u64, stderr: u64, limit: Duration) {
        let drain = async |output: &Option<OutputStream>, bytes| {
            if let Some(output) = output {
                machine.drain_stream(&mut output.stream.clone(), bytes).await;
                if let Reader::Relay(relay) = &output.reader {
                    relay.delivered(bytes).await;
                }
            }
        };
        let both = async { tokio::join!(drain(&self.stdout, stdout), drain(&self.stderr, stderr)) };
        let _ = tokio::time::timeout(limit, both).await;
    }

    /// Waits for the end of all output, at most `limit`. False if more could come.
    pub(crate) async fn finished(&self, limit: Duration) -> bool {
        let all = async {
            for output in self.outputs() {
                output.stream.clone().closed().await;
                output.reader.finished().await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    /// Closes all streams at once: readers have seen the end of the file when this returns, unless
    /// the vmm does not do it within `limit`, and logging programs have ended.
    pub(crate) async fn close(&self, machine: &Machine, limit: Duration) {
        self.stdin_writer.lock().take();
        let closing = async {
            let outputs = self.outputs().map(|output| &output.stream);
            for stream in self.stdin.iter().chain(outputs) {
                machine.close_stream(stream).await;
            }
            for output in self.outputs() {
                output.stream.clone().closed().await;
                output.reader.finished().await;
            }
        };
        // A vmm that does not do it is of no use to its other containers either; its owner finds out.
        let _ = tokio::time::timeout(limit, closing).await;
        let loggers = std::mem::take(&mut *self.loggers.lock());
        for logger in loggers {
            logger.finish().await;
        }
    }

    fn outputs(&self) -> impl Iterator<Item = &OutputStream> {
        [&self.stdout, &self.stderr].into_iter().flatten()
    }
}

impl Reader {
    /// Waits until what the machine wrote, and will not add to, was taken.
    async fn finished(&self) {
        match self {
            Self::Own { .. } => {}
            Self::Relay(relay) => relay.ended().await,
        }
    }
}

fn open_error<'a>(stream: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StdioError + use<'a> {
    move |source| StdioError::Open {
        stream,
        path: path.to_owned(),
        source,
    }
}

fn streaming_error<'a>(stream: &'static str, id: &'a str) -> impl FnOnce(StreamingError) -> StdioError + use<'a> {
    move |source| StdioError::Streaming {
        stream,
        id: id.to_owned(),
        source,
    }
}

/// Reads what comes next from a pipe, nothing at its end. A process that is being started has copies of
/// all descriptors of a test for a moment: the end comes when the last copy is gone, so this waits for it.
#[cfg(test)]
pub(crate) fn read_next(pipe: &File) -> Vec<u8> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use std::io::Read;
    let mut pipe = pipe.try_clone().unwrap();
    fcntl_setfl(&pipe, fcntl_getfl(&pipe).unwrap() - OFlags::NONBLOCK).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        let count = pipe.read(&mut bytes).unwrap();
        sender.send(bytes[..count].to_vec())
    });
    let read = receiver.recv_timeout(Duration::from_secs(20));
    read.expect("bytes or the end of a pipe")
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    async fn open(request: StdioSpec) -> Result<OpenedStreams, StdioError> {
        request.open("c1", &StdioContext::default()).await
    }

    fn write(output: Option<Output>, text: &str) {
        File::from(output.unwrap().machine).write_all(text.as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn terminal_has_no_standard_error_and_files_are_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("deep/er/log");
        for text in ["a", "b"] {
            let opened = open(StdioSpec {
                stdout: format!("file://{}", log.display()),
                stderr: "/no/such/fifo".to_owned(),
                terminal: true,
                ..StdioSpec::default()
            });
            let opened = opened.await.unwrap();
            assert!(opened.stderr.is_none());
            write(opened.stdout, text);
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "ab");
    }

    #[tokio::test]
    async fn both_streams_go_into_one_file_named_once_or_twice() {
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
            write(opened.stdout, "out ");
            write(opened.stderr, "err ");
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "out err out err ");
    }

    #[test]
    fn program_that_is_named_twice_is_started_once() {
        let endpoint = |uri| Endpoint::parse("stdout", uri).unwrap();
        let [one, same] = ["binary:///a?x=y"; 2].map(endpoint);
        let (other, fifo) = (endpoint("binary:///b"), endpoint("/fifo"));
        let started = |stdout, stderr| {
            let programs = programs(stdout, stderr);
            programs.into_iter().map(|(_, wanted)| wanted).collect::<Vec<_>>()
        };
        assert_eq!(started(one.as_ref(), same.as_ref()), [[true, true]]);
        assert_eq!(started(one.as_ref(), other.as_ref()), [[true, false], [false, true]]);
        assert_eq!(started(None, other.as_ref()), [[false, true]]);
        assert_eq!(started(fifo.as_ref(), None), Vec::<[bool; 2]>::new());
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_named() {
        let error = open(StdioSpec {
            stdout: "/no/such/fifo".to_owned(),
            ..StdioSpec::default()
        });
        let error = error.await.unwrap_err().to_string();
        assert!(error.starts_with("open stdout /no/such/fifo: "), "{error}");

        let error = open(StdioSpec {
            stdin: "file:///etc/passwd".to_owned(),
            ..StdioSpec::default()
        });
        let error = error.await.unwrap_err().to_string();
        assert!(error.starts_with("stdin file:///etc/passwd: "), "{error}");
    }
}
