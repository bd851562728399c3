//! The standard streams of a process in a machine.

use std::{fs::File, time::Duration};

use parking_lot::Mutex;

use super::{file_writer::FileWriter, logger::Logger, streaming::Relay};
use crate::shim::machine::{GuestStream, Machine};

/// The streams of a process, from its start until its deletion.
#[derive(Debug, Default)]
pub(crate) struct StandardStreams {
    stdin: Option<GuestStream>,
    stdin_writer: Mutex<Option<HostWriter>>,
    stdout: Option<OutputStream>,
    stderr: Option<OutputStream>,
    loggers: Mutex<Vec<Logger>>,
    /// The readers of a process whose bytes the shim moves ([`Self::moved_by_shim`]), kept open until the streams are
    /// closed.
    readers: Mutex<Vec<HostReader>>,
}

/// The writing side of a standard input on the host. The input ends when it is closed.
#[derive(Debug)]
pub(super) enum HostWriter {
    /// The client writes to the fifo, of which the shim holds a writer too.
    Fifo { _writer: File },
    /// A task of the shim relays between containerd's streaming I/O and a pipe.
    Relay(Relay),
}

/// The reading side of an output on the host.
#[derive(Debug)]
pub(super) enum HostReader {
    /// The client reads directly. For a fifo, the shim holds a reader too.
    Direct { _reader: Option<File> },
    /// A thread of the shim writes a file.
    File(FileWriter),
    /// A task of the shim relays between containerd's streaming I/O and a pipe.
    Relay(Relay),
}

impl HostReader {
    /// Waits until the file or the streaming client has received the first `bytes` bytes of this output, or can receive
    /// no more. Returns at once if the client reads from the machine directly.
    pub(super) async fn delivered(&self, bytes: u64) {
        match self {
            Self::Direct { .. } => {}
            Self::File(writer) => writer.delivered(bytes).await,
            Self::Relay(relay) => relay.delivered(bytes).await,
        }
    }

    /// Waits until all bytes have arrived. Call this after the vmm has closed its end of the stream.
    pub(super) async fn ended(&self) {
        self.delivered(u64::MAX).await;
    }
}

/// Standard output or standard error.
#[derive(Debug)]
pub(super) struct OutputStream {
    pub(super) stream: GuestStream,
    pub(super) reader: HostReader,
}

impl StandardStreams {
    pub(super) fn new(
        stdin: Option<(GuestStream, HostWriter)>,
        stdout: Option<OutputStream>,
        stderr: Option<OutputStream>,
        loggers: Vec<Logger>,
    ) -> Self {
        let (stdin, writer) = stdin.unzip();
        Self {
            stdin,
            stdin_writer: Mutex::new(writer),
            stdout,
            stderr,
            loggers: Mutex::new(loggers),
            readers: Mutex::default(),
        }
    }

    /// The streams of a process whose bytes the shim moves itself: an exec by the QEMU guest agent. The vmm has no stream
    /// for them.
    pub(super) fn moved_by_shim(writer: Option<HostWriter>, readers: Vec<HostReader>, loggers: Vec<Logger>) -> Self {
        Self {
            stdin_writer: Mutex::new(writer),
            loggers: Mutex::new(loggers),
            readers: Mutex::new(readers),
            ..Self::default()
        }
    }

    /// Ends standard input. The process reads what was sent before, and what other writers of a fifo still send.
    pub(crate) fn close_stdin(&self) {
        let mut writer = self.stdin_writer.lock();
        match &*writer {
            Some(HostWriter::Relay(relay)) => relay.end_input(),
            Some(HostWriter::Fifo { .. }) => *writer = None,
            None => {}
        }
    }

    /// Waits until the first `stdout` and `stderr` bytes of the outputs have been delivered, for at most `limit`: a
    /// client that does not read must not delay the exit event. Later bytes are still delivered afterwards.
    pub(crate) async fn drained(&self, machine: &Machine, stdout: u64, stderr: u64, limit: Duration) {
        let drain = async |output: &Option<OutputStream>, bytes| {
            if let Some(output) = output {
                machine.drain_stream(&mut output.stream.clone(), bytes).await;
                output.reader.delivered(bytes).await;
            }
        };
        let both = async { tokio::join!(drain(&self.stdout, stdout), drain(&self.stderr, stderr)) };
        let _ = tokio::time::timeout(limit, both).await;
    }

    /// Waits for the end of all output, for at most `limit`. Returns false if more may follow.
    pub(crate) async fn finished(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.outputs_finished()).await.is_ok()
    }

    /// Closes all streams without waiting for output that is still to come, and ends the logging programs. Clients see
    /// the end of their streams when this returns, unless that takes longer than `limit`.
    pub(crate) async fn close(&self, machine: &Machine, limit: Duration) {
        self.stdin_writer.lock().take();
        let close = async {
            let outputs = self.outputs().map(|output| &output.stream);
            for stream in self.stdin.iter().chain(outputs) {
                machine.close_stream(stream).await;
            }
            self.outputs_finished().await;
        };
        // After a timeout, the vmm hangs, or a file or a streaming client does not take the rest of the output, which is
        // then lost. If the vmm hangs, the next request to the machine fails.
        let _ = tokio::time::timeout(limit, close).await;
        self.readers.lock().clear();
        let loggers = std::mem::take(&mut *self.loggers.lock());
        for logger in loggers {
            logger.finish().await;
        }
    }

    async fn outputs_finished(&self) {
        for output in self.outputs() {
            output.stream.clone().closed().await;
            output.reader.ended().await;
        }
    }

    fn outputs(&self) -> impl Iterator<Item = &OutputStream> {
        [&self.stdout, &self.stderr].into_iter().flatten()
    }
}

impl OutputStream {
    /// The vsock port of the host that the guest connects to.
    pub(super) fn port(&self) -> u32 {
        self.stream.port()
    }
}
