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
    time::{Duration, SystemTime},
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
pub(super) fn says_all() -> bool {
    log::max_level() >= LevelFilter::Debug
}

/// Logs debug messages too from now on.
pub(super) fn enable_debug() {
    log::set_max_level(LevelFilter::Debug);
}

/// Logs what an operator has to know and can do something about.
pub(crate) fn error(message: &str) {
    log::error!("{message}");
}

/// Logs what went wrong and was dealt with.
pub(crate) fn warn(message: &str) {
    log::warn!("{message}");
}

/// Logs what happened.
pub(crate) fn info(message: &str) {
    log::info!("{message}");
}

/// Logs what helps to find a fault, where asked for.
pub(crate) fn debug(message: &str) {
    log::debug!("{message}");
}

#[derive(Debug)]
struct Logger {
    fifo: File,
    dropped: AtomicU64,
}

impl Logger {
    fn write(&self, level: Level, message: &str) {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let note = if dropped == 0 {
            String::new()
        } else {
            format!(" ({dropped} lines before this one were dropped)")
        };
        let text = line(now, level, &format!("{message}{note}"));
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
fn line(since_epoch: Duration, level: Level, message: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let mut line = format!("time=\"{}\" level={level} msg=\"", rfc3339(since_epoch));
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

/// UTC in RFC 3339 form with nanoseconds: the days since the epoch to a date of the Gregorian
/// calendar, counted in eras of 400 years that begin on 1 March.
fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    let nanosecond = since_epoch.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanosecond:09}Z")
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
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000000007Z"),
            (951_868_799, "2000-02-29T23:59:59.000000007Z"),
            (951_868_800, "2000-03-01T00:00:00.000000007Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007Z"),
        ] {
            assert_eq!(rfc3339(Duration::new(seconds, 7)), expected);
        }
    }

    #[test]
    fn a_line_is_one_line_whatever_the_message_holds() {
        let text = line(Duration::ZERO, Level::Warn, "say \"hi\"\\\nnext\ttab\u{1b}[0m");
        let expected = "time=\"1970-01-01T00:00:00.000000000Z\" level=warning \
                        msg=\"say \\\"hi\\\"\\\\\\nnext\\ttab\\u001b[0m\" runtime=io.containerd.nutshell.v2\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_long_message_is_cut_to_what_a_pipe_takes_whole() {
        let text = line(Duration::ZERO, Level::Info, &"ä\"".repeat(LONGEST_LINE));
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
        error("to nowhere");
        assert!(LOGGER.get().is_none());
    }
}
