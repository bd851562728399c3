//! The standard streams of a process on the host: what containerd names, opened and handed to the
//! machine. Bytes never pass through the shim.
//!
//! Of each fifo the shim keeps an end of its own. Of standard output and error the reading one:
//! a reader that goes away (containerd restarts) is no error for the process, which waits for the
//! next reader as it would for a slow one. Of standard input the writing one: a client that detaches
//! is no end of input, only [`Standard::close_stdin`] is (containerd `pkg/cio`, and the runc shim's
//! `process/io.go`).

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nutshell_protocol::Stdio;

use super::machine::{Machine, Stream};
use crate::vmm::control::ControlError;

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
        reason: &'static str,
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
}

/// What containerd asks for: paths or URIs, empty where there is no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// Standard input.
    pub(crate) stdin: String,
    /// Standard output, or all of a terminal's.
    pub(crate) stdout: String,
    /// Standard error; not used with a terminal.
    pub(crate) stderr: String,
    /// The process has a terminal.
    pub(crate) terminal: bool,
}

/// A stream's place on the host.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Fifo(PathBuf),
    /// Appended to, made with its folder if it is not there.
    Log(PathBuf),
}

/// Streams that are open and not yet the machine's.
#[derive(Debug)]
pub(crate) struct Opened {
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

#[derive(Debug)]
struct Input {
    machine: File,
    own: File,
}

#[derive(Debug)]
struct Output {
    machine: File,
    own: Option<File>,
}

/// The streams of a process in a machine.
#[derive(Debug, Default)]
pub(crate) struct Standard {
    stdin: Option<Stream>,
    stdin_writer: Mutex<Option<File>>,
    stdout: Option<OutputStream>,
    stderr: Option<OutputStream>,
}

#[derive(Debug)]
struct OutputStream {
    stream: Stream,
    _own: Option<File>,
}

impl Request {
    /// Opens all streams. Does not block.
    pub(crate) fn open(&self) -> Result<Opened, StdioError> {
        let stdin = place("stdin", &self.stdin)?
            .map(|place| match place {
                Place::Fifo(path) => open_input(&path).map_err(open_error("stdin", &path)),
                Place::Log(_) => Err(StdioError::Unsupported {
                    stream: "stdin",
                    uri: self.stdin.clone(),
                    reason: "input comes from a fifo",
                }),
            })
            .transpose()?;
        let stdout = open_output("stdout", &self.stdout)?;
        let stderr = if self.terminal {
            None
        } else {
            open_output("stderr", &self.stderr)?
        };
        Ok(Opened {
            terminal: self.terminal,
            stdin,
            stdout,
            stderr,
        })
    }
}

impl Opened {
    /// Hands the streams to `machine`; the second value is for the agent.
    pub(crate) async fn connect(
        self,
        machine: &Machine,
        size: Option<(u16, u16)>,
    ) -> Result<(Standard, Stdio), ControlError> {
        let mut stdio = Stdio {
            terminal: self.terminal,
            size,
            ..Stdio::default()
        };
        let mut standard = Standard::default();
        if let Some(input) = self.stdin {
            let stream = machine.open_stream(Some(input.machine.as_fd()), None).await?;
            stdio.stdin = Some(stream.port());
            standard.stdin = Some(stream);
            standard.stdin_writer = Mutex::new(Some(input.own));
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
    let Some(Output { machine: file, own }) = output else {
        return Ok((None, None));
    };
    let stream = machine.open_stream(None, Some(file.as_fd())).await?;
    let port = stream.port();
    Ok((Some(OutputStream { stream, _own: own }), Some(port)))
}

impl Standard {
    /// Ends the input once what is in the fifo was read and no client writes any more.
    pub(crate) fn close_stdin(&self) {
        self.stdin_writer.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits until the first `stdout` and `stderr` bytes reached their readers, at most `limit`:
    /// a reader that does not read must not hide the end of the process. The rest is delivered later.
    pub(crate) async fn drained(&self, machine: &Machine, stdout: u64, stderr: u64, limit: Duration) {
        let drain = async |output: &Option<OutputStream>, bytes| {
            if let Some(output) = output {
                machine.drained(&mut output.stream.clone(), bytes).await;
            }
        };
        let both = async { tokio::join!(drain(&self.stdout, stdout), drain(&self.stderr, stderr)) };
        let _ = tokio::time::timeout(limit, both).await;
    }

    /// Waits for the end of all output, at most `limit`. False if more could come.
    pub(crate) async fn finished(&self, limit: Duration) -> bool {
        let all = async {
            for output in [&self.stdout, &self.stderr].into_iter().flatten() {
                output.stream.clone().closed().await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    /// Closes all streams at once: readers have seen the end of the file when this returns, unless
    /// the vmm does not do it within `limit`.
    pub(crate) async fn close(&self, machine: &Machine, limit: Duration) {
        self.close_stdin();
        let outputs = || {
            [&self.stdout, &self.stderr]
                .into_iter()
                .flatten()
                .map(|output| &output.stream)
        };
        let closing = async {
            for stream in self.stdin.iter().chain(outputs()) {
                machine.close_stream(stream).await;
            }
            for stream in outputs() {
                stream.clone().closed().await;
            }
        };
        // A vmm that does not do it is of no use to its other containers either; its owner finds out.
        let _ = tokio::time::timeout(limit, closing).await;
    }
}

fn place(stream: &'static str, uri: &str) -> Result<Option<Place>, StdioError> {
    let unsupported = |reason| StdioError::Unsupported {
        stream,
        uri: uri.to_owned(),
        reason,
    };
    if uri.is_empty() {
        return Ok(None);
    }
    let (scheme, path) = uri.split_once("://").unwrap_or(("fifo", uri));
    if !path.starts_with('/') {
        return Err(unsupported("not an absolute path"));
    }
    match scheme {
        "fifo" => Ok(Some(Place::Fifo(path.into()))),
        "file" => Ok(Some(Place::Log(path.into()))),
        "binary" | "binary-v2" => Err(unsupported("logging programs are not supported yet")),
        _ => Err(unsupported("this kind of stream is not supported")),
    }
}

fn open_error<'a>(stream: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StdioError + use<'a> {
    move |source| StdioError::Open {
        stream,
        path: path.to_owned(),
        source,
    }
}

/// Never waits for the other end of a fifo.
fn non_blocking() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK);
    options
}

fn open_input(path: &Path) -> io::Result<Input> {
    let machine = non_blocking().read(true).open(path)?;
    let own = non_blocking().write(true).open(path)?;
    Ok(Input { machine, own })
}

fn open_output(stream: &'static str, uri: &str) -> Result<Option<Output>, StdioError> {
    Ok(match place(stream, uri)? {
        None => None,
        Some(Place::Fifo(path)) => Some(open_fifo_output(&path).map_err(open_error(stream, &path))?),
        Some(Place::Log(path)) => Some(open_log(&path).map_err(open_error(stream, &path))?),
    })
}

fn open_fifo_output(path: &Path) -> io::Result<Output> {
    if !fs::metadata(path)?.file_type().is_fifo() {
        let machine = non_blocking().append(true).open(path)?;
        return Ok(Output { machine, own: None });
    }
    // First, because a fifo without a reader cannot be opened for writing.
    let own = non_blocking().read(true).open(path)?;
    let machine = non_blocking().write(true).open(path)?;
    Ok(Output {
        machine,
        own: Some(own),
    })
}

fn open_log(path: &Path) -> io::Result<Output> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let machine = OpenOptions::new().append(true).create(true).mode(0o644).open(path)?;
    Ok(Output { machine, own: None })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use tempfile::TempDir;

    use super::*;

    fn fifo(folder: &TempDir, name: &str) -> String {
        let path = folder.path().join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    #[test]
    fn names_of_streams_are_told_apart() {
        let place = |uri| super::place("stdout", uri);
        assert_eq!(place("").unwrap(), None);
        assert_eq!(place("/a b").unwrap(), Some(Place::Fifo("/a b".into())));
        assert_eq!(place("fifo:///a").unwrap(), Some(Place::Fifo("/a".into())));
        assert_eq!(
            place("file:///var/log/x").unwrap(),
            Some(Place::Log("/var/log/x".into()))
        );
        for bad in [
            "relative",
            "file://relative",
            "binary:///bin/logger?id=1",
            "ttrpc+unix:///s",
            "gopher:///x",
        ] {
            let error = place(bad).unwrap_err().to_string();
            assert!(error.contains("stdout") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn fifos_open_without_a_peer_and_a_reader_that_leaves_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let request = Request {
            stdin: fifo(&folder, "in"),
            stdout: fifo(&folder, "out"),
            stderr: fifo(&folder, "err"),
            terminal: false,
        };
        let opened = request.open().unwrap();
        let mut output = opened.stdout.unwrap();

        let reader = non_blocking().read(true).open(&request.stdout).unwrap();
        output.machine.write_all(b"a").unwrap();
        drop(reader);
        output.machine.write_all(b"b").unwrap();

        let mut reader = File::open(&request.stdout).unwrap();
        drop(output.machine);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"ab");
    }

    #[test]
    fn input_ends_only_when_the_own_writer_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = fifo(&folder, "in");
        let Input { mut machine, own } = open_input(Path::new(&path)).unwrap();
        for text in ["first", "second"] {
            OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }
        let mut bytes = [0; 64];
        assert_eq!(machine.read(&mut bytes).unwrap(), 11);
        // Both clients are gone, and still it is not the end.
        assert_eq!(machine.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        drop(own);

        assert_eq!(machine.read(&mut bytes).unwrap(), 0);
    }

    #[test]
    fn terminal_has_no_standard_error_and_files_are_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("deep/er/log");
        for text in ["a", "b"] {
            let opened = Request {
                stdout: format!("file://{}", log.display()),
                stderr: "/no/such/fifo".to_owned(),
                terminal: true,
                ..Request::default()
            }
            .open()
            .unwrap();
            assert!(opened.stderr.is_none());
            opened.stdout.unwrap().machine.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "ab");
    }

    #[test]
    fn missing_fifo_is_named() {
        let request = Request {
            stdout: "/no/such/fifo".to_owned(),
            ..Request::default()
        };
        let error = request.open().unwrap_err().to_string();
        assert!(error.starts_with("open stdout /no/such/fifo: "), "{error}");
    }
}
