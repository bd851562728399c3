//! Log lines to the bundle's `log` fifo, which containerd copies into its own log.
//!
//! The fifo is opened for reading and writing, so that a containerd that goes away neither blocks
//! the open nor breaks the pipe, and never blocks: what does not fit is dropped and counted
//! (containerd `core/runtime/v2/README.md`, "Logging"). The virtual machine must not wait for a reader of logs.
//!
//! Libraries log through the `log` crate, the shim through the functions here; both end up in the
//! one fifo. Before [`start`], and in the other roles, nothing is written.

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

/// A write to a pipe is whole or not at all up to this many bytes (pipe(7), `PIPE_BUF`).
const LONGEST_LINE: usize = 4096;

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Logs into the fifo of `bundle` from now on; into nothing if there is none.
pub(crate) fn start(bundle: &Path, debug: bool) {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(bundle.join("log"));
    let Ok(fifo) = fifo else { return };
    let logger = LOGGER.get_or_init(|| Logger {
        fifo,
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

/// Logs debug messages too from now on.
pub(crate) fn enable_debug() {
    log::set_max_level(LevelFilter::Debug);
}

#[derive(Debug)]
struct Logger {
    fifo: File,
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
        let text = line(SystemTime::now(), level, &format!("{message}{note}"));
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

/// One line as logrus, containerd's own logger, writes it.
fn line(now: SystemTime, level: Level, message: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let mut line = format!("time=\"{}\" level={level} msg=\"", humantime::format_rfc3339_nanos(now));
    let end = "\" runtime=io.containerd.nutshell.v2\n";
    for character in message.trim_end().chars() {
        let mark = line.len();
        match character {
            '"' | '\\' => line.extend(['\\', character]),
            '\n' => line.push_str("\\n"),
            '\t' => line.push_str("\\t"),
            character if character.is_control() => {
                write!(line, "\\u{:04x}", u32::from(character)).expect("a String takes every write");
            }
            character => line.push(character),
        }
        if line.len() + end.len() > LONGEST_LINE {
            line.truncate(mark);
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
            dropped: AtomicU64::new(0),
        };
        (logger, open())
    }

    #[test]
    fn a_line_is_one_line_whatever_the_message_holds() {
        let text = line(SystemTime::UNIX_EPOCH, Level::Warn, "say \"hi\"\\\nnext\ttab\u{1b}[0m");
        let expected = "time=\"1970-01-01T00:00:00.000000000Z\" level=warning \
                        msg=\"say \\\"hi\\\"\\\\\\nnext\\ttab\\u001b[0m\" runtime=io.containerd.nutshell.v2\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_long_message_is_cut_to_what_a_pipe_takes_whole() {
        let text = line(SystemTime::UNIX_EPOCH, Level::Info, &"ä\"".repeat(LONGEST_LINE));
        assert!(text.len() <= LONGEST_LINE && text.len() > LONGEST_LINE - 8);
        assert!(text.ends_with("v2\n"));
    }

    #[test]
    fn a_full_fifo_drops_lines_and_the_next_that_fits_tells_how_many() {
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
    fn a_bundle_without_fifo_logs_nothing_and_fails_nothing() {
        let directory = tempfile::tempdir().unwrap();
        start(directory.path(), true);
        log::error!("to nowhere");
        assert!(LOGGER.get().is_none());
    }
}
