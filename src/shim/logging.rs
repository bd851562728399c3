//! The logger: writes to the fifo `log` in the bundle, which containerd copies into its own log (containerd
//! `core/runtime/v2/README.md`, "Logging").
//!
//! The fifo is opened for reading and writing, so that the open does not block and writes do not fail while it has no
//! reader. It is non-blocking, because the virtual machine must not wait for a log reader: lines that do not fit are
//! dropped and counted.
//!
//! The shim and its libraries log with the macros of the `log` crate. Before [`start`], and in the other roles of the
//! executable, nothing is written.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Maximum length of a line in bytes: a write to a pipe is atomic up to this size (pipe(7), `PIPE_BUF`).
const MAX_LINE: usize = 4096;

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Installs the logger for the fifo in `bundle`. The last component of that path, the id of the container or sandbox
/// that this shim was started for, ends up in every line. No-op if the fifo cannot be opened.
pub(crate) fn start(bundle: &Path, debug: bool) {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(bundle.join("log"));
    let Ok(fifo) = fifo else { return };
    let id = bundle.file_name().unwrap_or_default().to_string_lossy();
    let logger = LOGGER.get_or_init(|| Logger {
        fifo,
        end: format_end(&id),
        dropped: AtomicU64::new(0),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
}

/// Whether debug messages are logged.
pub(crate) fn debug_enabled() -> bool {
    log::max_level() >= LevelFilter::Debug
}

pub(crate) fn enable_debug() {
    log::set_max_level(LevelFilter::Debug);
}

#[derive(Debug)]
struct Logger {
    fifo: File,
    /// The end of every line.
    end: String,
    dropped: AtomicU64,
}

impl Logger {
    fn write(&self, level: Level, message: &str) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let note = if dropped == 0 {
            String::new()
        } else {
            format!(" ({dropped} lines before this one were dropped)")
        };
        let text = format_line(SystemTime::now(), level, &format!("{message}{note}"), &self.end);
        if !matches!((&self.fifo).write(text.as_bytes()), Ok(written) if written == text.len()) {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.write(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// The end of the lines of a shim. containerd allows only letters, digits, `-`, `_` and `.` in an id.
fn format_end(id: &str) -> String {
    format!("\" id={id} runtime=io.containerd.nutshell.v2\n")
}

/// Formats a line like logrus, containerd's logger. Truncates a message that is too long for a line with `end`.
fn format_line(now: SystemTime, level: Level, message: &str, end: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let mut line = format!("time=\"{}\" level={level} msg=\"", humantime::format_rfc3339_nanos(now));
    for character in message.trim_end().chars() {
        let length = line.len();
        match character {
            '"' | '\\' => line.extend(['\\', character]),
            '\n' => line.push_str("\\n"),
            '\t' => line.push_str("\\t"),
            character if character.is_control() => {
                write!(line, "\\u{:04x}", u32::from(character)).expect("a String accepts every write");
            }
            character => line.push(character),
        }
        if line.len() + end.len() > MAX_LINE {
            line.truncate(length);
            break;
        }
    }
    line.push_str(end);
    line
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{CWD, FileType, Mode};

    use super::*;

    fn logger(directory: &Path) -> (Logger, File) {
        let path = directory.join("log");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o700), 0).unwrap();
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .unwrap()
        };
        let logger = Logger {
            fifo: open(),
            end: format_end("c1"),
            dropped: AtomicU64::new(0),
        };
        (logger, open())
    }

    #[test]
    fn control_characters_of_a_message_are_escaped() {
        let text = format_line(
            SystemTime::UNIX_EPOCH,
            Level::Warn,
            "say \"hi\"\\\nnext\ttab\u{1b}[0m",
            &format_end("c1"),
        );
        let expected = "time=\"1970-01-01T00:00:00.000000000Z\" level=warning \
                        msg=\"say \\\"hi\\\"\\\\\\nnext\\ttab\\u001b[0m\" id=c1 runtime=io.containerd.nutshell.v2\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn long_message_is_truncated_to_an_atomic_write() {
        let text = format_line(
            SystemTime::UNIX_EPOCH,
            Level::Info,
            &"ä\"".repeat(MAX_LINE),
            &format_end("c1"),
        );
        assert!(text.len() <= MAX_LINE && text.len() > MAX_LINE - 8);
        assert!(text.ends_with("v2\n"));
    }

    #[test]
    fn lines_dropped_by_a_full_fifo_are_counted_in_the_next_line() {
        let directory = tempfile::tempdir().unwrap();
        let (logger, mut reader) = logger(directory.path());
        let message = "x".repeat(4_000);
        while logger.dropped.load(Ordering::Relaxed) < 3 {
            logger.write(Level::Info, &message);
        }
        let mut drained = vec![0; 1 << 20];
        while reader.read(&mut drained).is_ok() {}
        logger.write(Level::Info, "after");
        let read = reader.read(&mut drained).unwrap();
        let text = String::from_utf8_lossy(&drained[..read]);
        assert!(text.contains("after (3 lines before this one were dropped)"), "{text}");
    }

    #[test]
    fn bundle_without_a_fifo_disables_logging() {
        let directory = tempfile::tempdir().unwrap();
        start(directory.path(), true);
        log::error!("to nowhere");
        assert!(LOGGER.get().is_none());
    }
}
