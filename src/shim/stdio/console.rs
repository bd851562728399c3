//! The console of a virtual machine: the standard input and output of its task. The machine gets them anew at each
//! boot.

use std::{io, os::fd::OwnedFd, time::Duration};

use parking_lot::Mutex;

use super::{
    logger::Logger,
    standard::{HostReader, HostWriter},
};

/// The streams of a console, from the creation of its task until the deletion.
#[derive(Debug)]
pub(crate) struct ConsoleStreams(Mutex<Ends>);

#[derive(Debug, Default)]
struct Ends {
    /// The end that the machine reads from.
    input: Option<OwnedFd>,
    /// Kept open, so that the input does not end: a serial port has no end of file.
    input_writer: Option<HostWriter>,
    /// The end that the machine writes to.
    output: Option<OwnedFd>,
    output_reader: Option<HostReader>,
    loggers: Vec<Logger>,
}

impl ConsoleStreams {
    pub(super) fn new(
        input: Option<(OwnedFd, HostWriter)>,
        output: Option<(OwnedFd, HostReader)>,
        loggers: Vec<Logger>,
    ) -> Self {
        let (input, input_writer) = input.unzip();
        let (output, output_reader) = output.unzip();
        Self(Mutex::new(Ends {
            input,
            input_writer,
            output,
            output_reader,
            loggers,
        }))
    }

    /// Duplicates of the ends of the machine: input and output.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(crate) fn for_machine(&self) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
        let ends = self.0.lock();
        let duplicate = |end: &Option<OwnedFd>| end.as_ref().map(OwnedFd::try_clone).transpose();
        Ok((duplicate(&ends.input)?, duplicate(&ends.output)?))
    }

    /// Closes the ends of the machine, which has ended: clients see the end of its output. What they have not read
    /// stays in the pipe.
    pub(crate) fn close_machine_ends(&self) {
        let mut ends = self.0.lock();
        (ends.input, ends.input_writer, ends.output) = (None, None, None);
    }

    /// Closes all streams after the end of the machine, and ends the logging programs. Waits until clients have the
    /// output, for at most `limit`.
    pub(crate) async fn close(&self, limit: Duration) {
        let Ends {
            input,
            input_writer,
            output,
            output_reader,
            loggers,
        } = std::mem::take(&mut *self.0.lock());
        drop((input, input_writer, output));
        if let Some(reader) = output_reader {
            // A client that does not read loses the rest.
            let _ = tokio::time::timeout(limit, reader.ended()).await;
        }
        for logger in loggers {
            logger.finish().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use crate::shim::stdio::{StdioContext, StdioSpec};

    #[tokio::test]
    async fn each_boot_gets_the_ends_of_the_same_streams() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["in", "out"] {
            mkfifo(&path(name), Mode::S_IRWXU).unwrap();
        }
        let spec = StdioSpec {
            stdin: path("in").display().to_string(),
            stdout: path("out").display().to_string(),
            terminal: true,
            ..StdioSpec::default()
        };
        let opened = spec.open("c1", &StdioContext::default()).await.unwrap();
        let console = opened.into_console().unwrap();
        for boot in ["first", "second"] {
            let mut typed = File::options().write(true).open(path("in")).unwrap();
            typed.write_all(boot.as_bytes()).unwrap();
            drop(typed);

            let (input, output) = console.for_machine().unwrap();

            let mut bytes = [0; 64];
            let mut input = File::from(input.unwrap());
            let count = input.read(&mut bytes).unwrap();
            assert_eq!(&bytes[..count], boot.as_bytes());
            // The client has closed it, and it has not ended.
            assert_eq!(
                input.read(&mut bytes).unwrap_err().kind(),
                std::io::ErrorKind::WouldBlock
            );
            File::from(output.unwrap()).write_all(boot.as_bytes()).unwrap();
        }
        let mut reader = File::open(path("out")).unwrap();
        console.close_machine_ends();
        console.close(std::time::Duration::from_secs(1)).await;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "firstsecond");
        let (input, output) = console.for_machine().unwrap();
        assert!(input.is_none() && output.is_none());
    }
}
