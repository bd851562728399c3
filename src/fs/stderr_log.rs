//! The log of the file server: a few messages on standard error, which the shim reads. A guest can cause messages, so
//! their number is bounded.

use std::{
    panic, process,
    sync::atomic::{AtomicU32, Ordering},
};

use log::{LevelFilter, Log, Metadata, Record};

/// Maximum number of messages in the life of the process.
const MAX_MESSAGES: u32 = 32;

struct StderrLog {
    messages: AtomicU32,
}

static LOG: StderrLog = StderrLog {
    messages: AtomicU32::new(0),
};

impl Log for StderrLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // The load keeps the counter from overflowing.
        if self.messages.load(Ordering::Relaxed) < MAX_MESSAGES
            && self.messages.fetch_add(1, Ordering::Relaxed) < MAX_MESSAGES
        {
            eprintln!("nutshell fs: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Sends errors of this role and of virtiofsd to standard error. A panic of any thread ends the process: without the
/// thread, the guest would wait for its requests indefinitely.
pub(super) fn install() {
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
    panic::set_hook(Box::new(|panic| {
        eprintln!("nutshell fs: {panic}");
        process::abort();
    }));
}
