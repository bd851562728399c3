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
    /// Kept open until the streams are closed.
    readers: Mutex<Vec<HostReader>>,
}

/// The writing side of a standard input on the host. The input ends when it is closed.
#[derive(Debug)]
pub(super) enum HostWriter {
    /// The client writes to the fifo, of which the shim holds a writer too.
    Fifo {
        _writer: File,
    },
    Relay(Relay),
}

/// The reading side of an output on the host.
#[derive(Debug)]
pub(super) enum HostReader {
    /// The client reads directly. For a fifo, the shim holds a reader too.
    Direct {
        _reader: Option<File>,
    },
    /// A thread of the shim writes a file.
    File(FileWriter),
    Relay(Relay),
}

impl HostReader {
    /// Waits until the first `bytes` bytes that left the machine have arrived, or none can arrive any more.
    pub(super) async fn delivered(&self, bytes: u64) {
        match self {
            Self::Direct { .. } => {}
            Self::File(writer) => writer.delivered(bytes).await,
            Self::Relay(relay) => relay.delivered(bytes).await,
        }
    }

    /// Waits until all bytes have arrived. Call it when the machine's end is closed.
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

    /// The streams of a process whose bytes the shim moves itself. The machine has none of them.
    pub(super) fn without_machine(writer: Option<HostWriter>, readers: Vec<HostReader>, loggers: Vec<Logger>) -> Self {
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

    /// Closes all streams at once and ends the logging programs. Clients see the end of their streams when this
    /// returns, unless the vmm takes longer than `limit`.
    pub(crate) async fn close(&self, machine: &Machine, limit: Duration) {
        self.stdin_writer.lock().take();
        let close = async {
            let outputs = self.outputs().map(|output| &output.stream);
            for stream in self.stdin.iter().chain(outputs) {
                machine.close_stream(stream).await;
            }
            self.outputs_finished().await;
        };
        // A timeout means that the vmm hangs. Then the next request to the machine fails.
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
