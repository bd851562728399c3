//! Why libcontainer failed. Its errors name the step and lose the cause ("failed to prepare rootfs"),
//! but it logs the cause first, and from whichever of its processes hit it. This listens to the log,
//! for errors only: nothing is formatted while all goes well.

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

/// Begins a cause that is in its final words.
const VERBATIM_MARK: char = '\u{1}';

/// What libcontainer logs before the errno where the process's folder cannot be entered.
const CHDIR_FAILED: &str = "failed to chdir: ";

/// Ends a cause.
const CAUSE_END: char = '\u{2}';

/// Where the processes of one creation write why they fail.
#[derive(Debug)]
pub(crate) struct Diagnosis {
    causes: OwnedFd,
    writer: CauseWriter,
}

impl Diagnosis {
    /// Listens to this process and those that it forks from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        let (causes, pipe) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let writer = CauseWriter(std::sync::Arc::new(pipe));
        let dispatch = Dispatch::new(ErrorLog(writer.clone()));
        tracing_core::dispatcher::set_global_default(dispatch).map_err(io::Error::other)?;
        Ok(Self { causes, writer })
    }

    /// For those who know the final words themselves.
    pub(crate) fn writer(&self) -> CauseWriter {
        self.writer.clone()
    }

    /// The first cause, or the error itself where there is none. `cwd` is the process's.
    pub(crate) fn explain(self, error: &dyn std::error::Error, cwd: &Path) -> String {
        drop(self.writer);
        let mut text = Vec::new();
        // The writers' copies in other processes may live on: what is there now is all that counts.
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

/// What an errno's name means, in runc's words; the name itself for those that nobody meets.
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

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Errors that only pass another one on say the same as it.
        if !text.ends_with(&cause.to_string()) {
            let _ = write!(text, ": {cause}");
        }
        source = cause.source();
    }
    text
}

/// Writes causes.
#[derive(Debug, Clone)]
pub(crate) struct CauseWriter(std::sync::Arc<OwnedFd>);

impl CauseWriter {
    /// Writes the user's final words.
    pub(crate) fn write_verbatim(&self, words: &str) {
        self.write(&format!("{VERBATIM_MARK}{words}{CAUSE_END}"));
    }

    /// The descriptor's number, for a program that a process of this creation executes and that
    /// calls [`Self::from_inherited`]. The container's own program never gets it: libcontainer closes all.
    pub(crate) fn share_with_programs(&self) -> io::Result<i32> {
        rustix::io::fcntl_setfd(&*self.0, FdFlags::empty())?;
        Ok(self.0.as_raw_fd())
    }

    /// What [`Self::share_with_programs`] passed on as descriptor `number`.
    pub(crate) fn from_inherited(number: i32) -> Option<Self> {
        Some(Self(std::sync::Arc::new(crate::sys::take_inherited_descriptor(
            number,
        )?)))
    }

    fn write(&self, text: &str) {
        // What does not fit is cut; the pipe holds more than a screen of text.
        let _ = rustix::io::write(&*self.0, text.as_bytes());
    }
}

/// Writes each logged error as "message: value: value".
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
