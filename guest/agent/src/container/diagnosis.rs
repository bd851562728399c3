//! Determines the cause of a failure in libcontainer. libcontainer's errors name the failed step but not the cause
//! ("failed to prepare rootfs"). The failing process logs the cause first, so this records all messages that
//! libcontainer logs at the error level. Other messages are not even formatted.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use tracing_core::field::{Field, Visit};
use tracing_core::span::{Attributes, Id, Record};
use tracing_core::subscriber::Interest;
use tracing_core::{Dispatch, Event, Level, LevelFilter, Metadata, Subscriber};

/// Precedes a cause that is shown to the user unchanged.
const VERBATIM_MARK: char = '\u{1}';

/// The message that libcontainer logs, followed by the errno, if it cannot change to the working directory of the
/// process.
const CHDIR_FAILED: &str = "failed to chdir: ";

/// Terminates a cause.
const CAUSE_END: char = '\u{2}';

/// A pipe to which the processes that create one container write the causes of failures.
#[derive(Debug)]
pub(crate) struct Diagnosis {
    causes: OwnedFd,
    writer: CauseWriter,
}

impl Diagnosis {
    /// Starts to record the errors that this process and its forked children log.
    pub(crate) fn listen() -> io::Result<Self> {
        let (causes, pipe) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let writer = CauseWriter(std::sync::Arc::new(pipe));
        let dispatch = Dispatch::new(ErrorLog(writer.clone()));
        tracing_core::dispatcher::set_global_default(dispatch).map_err(io::Error::other)?;
        Ok(Self { causes, writer })
    }

    /// Returns a writer for causes that libcontainer does not log.
    pub(crate) fn writer(&self) -> CauseWriter {
        self.writer.clone()
    }

    /// Returns the error text for the user: a verbatim cause, else the first logged one, else `error` with its sources.
    /// `cwd` is the working directory of the process.
    pub(crate) fn explain(self, error: &dyn std::error::Error, cwd: &Path) -> String {
        drop(self.writer);
        let mut text = Vec::new();
        // Other processes may still hold the write end. The read end does not block, so this reads the available data
        // only.
        let _ = File::from(self.causes).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let mut causes = text.split(CAUSE_END).filter(|cause| !cause.is_empty());
        let verbatim = causes.clone().find_map(|cause| cause.strip_prefix(VERBATIM_MARK));
        let Some(cause) = verbatim.or_else(|| causes.next()) else {
            return error_chain(error);
        };
        match cause.strip_prefix(CHDIR_FAILED) {
            Some(errno) => format!(
                "chdir to cwd ({cwd:?}) set in config.json failed: {}",
                errno_text(errno)
            ),
            None => cause.to_owned(),
        }
    }
}

/// Returns runc's text for the name of an errno, or the name itself for those that are unlikely here.
fn errno_text(name: &str) -> &str {
    match name {
        "EACCES" => "permission denied",
        "ELOOP" => "too many levels of symbolic links",
        "ENAMETOOLONG" => "file name too long",
        "ENOENT" => "no such file or directory",
        "ENOTDIR" => "not a directory",
        other => other,
    }
}

/// Returns the texts of an error and its sources, without repetitions.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // A transparent error has the text of its source.
        if !text.ends_with(&cause.to_string()) {
            let _ = write!(text, ": {cause}");
        }
        source = cause.source();
    }
    text
}

/// Writes causes to a [`Diagnosis`], also from other processes.
#[derive(Debug, Clone)]
pub(crate) struct CauseWriter(std::sync::Arc<OwnedFd>);

impl CauseWriter {
    /// Writes a cause that is the error text for the user.
    pub(crate) fn write_verbatim(&self, text: &str) {
        self.write(&format!("{VERBATIM_MARK}{text}{CAUSE_END}"));
    }

    /// Makes the descriptor survive execve(2), and returns its number for [`Self::from_inherited`] in that program. The
    /// container's program does not inherit it, because libcontainer closes all descriptors.
    pub(crate) fn share_with_programs(&self) -> io::Result<i32> {
        rustix::io::fcntl_setfd(&*self.0, FdFlags::empty())?;
        Ok(self.0.as_raw_fd())
    }

    /// Takes ownership of the descriptor that [`Self::share_with_programs`] returned, in the executed program.
    pub(crate) fn from_inherited(number: i32) -> Option<Self> {
        Some(Self(std::sync::Arc::new(crate::sys::take_inherited_descriptor(
            number,
        )?)))
    }

    fn write(&self, text: &str) {
        // A text that does not fit into the pipe is truncated. The pipe holds 64 KiB.
        let _ = rustix::io::write(&*self.0, text.as_bytes());
    }
}

/// A `tracing` subscriber that writes each logged error as "message: value: value".
struct ErrorLog(CauseWriter);

impl Subscriber for ErrorLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = LogLine::default();
        event.record(&mut line);
        self.0.write(&line.finish());
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct LogLine {
    message: String,
    values: String,
}

impl LogLine {
    fn finish(self) -> String {
        format!("{}{}{CAUSE_END}", self.message, self.values)
    }
}

impl Visit for LogLine {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.values, ": {value:?}")
        };
    }
}
