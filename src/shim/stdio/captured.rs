//! The streams of a process whose bytes the shim moves itself, because they do not pass through the machine's vsock
//! device: the input is read as a whole before the process starts, and the output is written after it has ended.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::fs::FileType;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
};

use super::{
    open::OpenedStreams,
    standard::{HostReader, HostWriter, StandardStreams},
};
use crate::shim::blocking;

/// The ends of the streams that are passed to the vmm if the process runs in a container.
#[derive(Debug)]
pub(crate) struct CapturedStreams {
    input: Option<OwnedFd>,
    stdout: Option<CapturedOutput>,
    stderr: Option<CapturedOutput>,
}

#[derive(Debug)]
struct CapturedOutput {
    end: OwnedFd,
    /// Takes the bytes from `end` to their destination, if the shim moves them on.
    reader: Option<HostReader>,
}

/// Why standard input was not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error(
        "standard input has more than {} MiB, the maximum with the QEMU guest agent: pass less, or run nutshell's agent in \
         the guest",
        .0 >> 20
    )]
    TooLong(u64),
    #[error("cannot read standard input: {0}")]
    Read(#[from] io::Error),
}

impl OpenedStreams {
    /// The streams of a process whose bytes the shim moves. The first part stays open until the process is deleted.
    pub(crate) fn into_captured(self) -> (StandardStreams, CapturedStreams) {
        let (input, stdout, stderr, loggers) = self.into_ends();
        let (input, writer) = input.unzip();
        // The input of a fifo ends when its clients have closed it, without CloseIO: ctr may read the end of its own
        // input before it can call that. A client opens the fifo before it calls Start.
        let writer = writer.filter(|writer| matches!(writer, HostWriter::Relay(_)));
        let mut readers = Vec::new();
        let mut capture = |output: Option<(OwnedFd, HostReader)>| {
            output.map(|(end, reader)| match reader {
                HostReader::Relay(_) | HostReader::File(_) => CapturedOutput {
                    end,
                    reader: Some(reader),
                },
                // Until a client has opened the fifo, this keeps the bytes in it.
                HostReader::Direct { .. } => {
                    readers.push(reader);
                    CapturedOutput { end, reader: None }
                }
            })
        };
        let captured = CapturedStreams {
            input,
            stdout: capture(stdout),
            stderr: capture(stderr),
        };
        (StandardStreams::moved_by_shim(writer, readers, loggers), captured)
    }
}

impl CapturedStreams {
    /// Whether [`Self::read_input`] has to wait for a client.
    pub(crate) fn has_input(&self) -> bool {
        self.input.is_some()
    }

    /// Whether standard error has a stream.
    pub(crate) fn has_stderr(&self) -> bool {
        self.stderr.is_some()
    }

    /// Reads standard input to its end. It has at most `limit` bytes.
    pub(crate) async fn read_input(&mut self, limit: u64) -> Result<Vec<u8>, InputError> {
        let mut bytes = Vec::new();
        if let Some(input) = self.input.take() {
            let mut input = pipe::Receiver::from_owned_fd(input)?.take(limit + 1);
            input.read_to_end(&mut bytes).await?;
        }
        match bytes.len() as u64 > limit {
            true => Err(InputError::TooLong(limit)),
            false => Ok(bytes),
        }
    }

    /// Writes the output, and ends it. Each client has `limit` to read it.
    ///
    /// # Errors
    ///
    /// The first failure; clients may lack a part of the output.
    pub(crate) async fn deliver(self, stdout: Vec<u8>, stderr: Vec<u8>, limit: Duration) -> io::Result<()> {
        let (first, second) = tokio::join!(deliver(self.stdout, stdout, limit), deliver(self.stderr, stderr, limit));
        first.and(second)
    }
}

async fn deliver(output: Option<CapturedOutput>, bytes: Vec<u8>, limit: Duration) -> io::Result<()> {
    let Some(CapturedOutput { end, reader }) = output else {
        return Ok(());
    };
    let write = async {
        write(end, bytes).await?;
        if let Some(reader) = reader {
            reader.ended().await;
        }
        Ok(())
    };
    let written = tokio::time::timeout(limit, write).await;
    written.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "its reader does not read")))
}

/// Writes all bytes and closes `end`.
async fn write(end: OwnedFd, bytes: Vec<u8>) -> io::Result<()> {
    let status = rustix::fs::fstat(&end)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Fifo {
        return pipe::Sender::from_owned_fd(end)?.write_all(&bytes).await;
    }
    let written = blocking::run("write the output of a process", move || {
        File::from(end).write_all(&bytes)
    });
    written.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::shim::stdio::{StdioContext, StdioSpec};

    const LIMIT: Duration = Duration::from_millis(200);

    async fn open(folder: &Path, stderr: &str) -> (StandardStreams, CapturedStreams) {
        let path = |name: &str| folder.join(name).display().to_string();
        mkfifo(&folder.join("out"), Mode::S_IRWXU).unwrap();
        let has_client = folder.join("in").exists();
        let spec = StdioSpec {
            stdin: if has_client { path("in") } else { String::new() },
            stdout: path("out"),
            stderr: stderr.to_owned(),
            terminal: false,
        };
        let opened = spec.open("e1", &StdioContext::default()).await.unwrap();
        opened.into_captured()
    }

    /// Opens a fifo for reading and writing, so that it does not wait for another reader.
    fn open_client(folder: &Path) -> fs::File {
        let fifo = folder.join("in");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        fs::File::options().read(true).write(true).open(fifo).unwrap()
    }

    #[tokio::test]
    async fn input_is_read_until_the_client_closes_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut client = open_client(folder.path());
        let (_streams, mut captured) = open(folder.path(), "").await;
        assert!(captured.has_input());
        client.write_all(b"typed").unwrap();
        let read = tokio::spawn(async move { captured.read_input(5).await });
        tokio::time::sleep(LIMIT).await;
        assert!(!read.is_finished());

        drop(client);

        assert_eq!(read.await.unwrap().unwrap(), b"typed");
    }

    #[tokio::test]
    async fn input_beyond_the_limit_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut client = open_client(folder.path());
        let (_streams, mut captured) = open(folder.path(), "").await;
        client.write_all(b"typed").unwrap();
        assert!(matches!(captured.read_input(4).await, Err(InputError::TooLong(4))));
    }

    #[tokio::test]
    async fn output_goes_to_fifo_and_file_and_ends() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let (streams, captured) = open(folder.path(), &format!("file://{}", log.display())).await;
        assert!(captured.has_stderr());

        captured.deliver(b"out".to_vec(), b"err".to_vec(), LIMIT).await.unwrap();

        // A client that opens the fifo late still gets it.
        let mut client = fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(folder.path().join("out"))
            .unwrap();
        drop(streams);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "out");
        assert_eq!(fs::read_to_string(log).unwrap(), "err");
    }

    #[tokio::test]
    async fn client_that_does_not_read_does_not_hold_up_the_exit() {
        let folder = tempfile::tempdir().unwrap();
        let (_streams, captured) = open(folder.path(), "").await;
        let error = captured
            .deliver(vec![b'x'; 1 << 20], Vec::new(), LIMIT)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
