//! What the file server says, on its standard error, which the shim reads: little, because a guest
//! can cause it.

use std::{
    panic, process,
    sync::atomic::{AtomicU32, Ordering},
};

use log::{LevelFilter, Log, Metadata, Record};

/// The most messages of one process.
const MAX_REPORTS: u32 = 32;

struct Bounded {
    said: AtomicU32,
}

static REPORT: Bounded = Bounded {
    said: AtomicU32::new(0),
};

impl Log for Bounded {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if self.said.load(Ordering::Relaxed) < MAX_REPORTS && self.said.fetch_add(1, Ordering::Relaxed) < MAX_REPORTS {
            eprintln!("nutshell fs: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Sends errors of this role and of virtiofsd to standard error, and ends the process where a
/// thread panics: a worker that is gone would leave the guest waiting for ever.
pub(super) fn install() {
    if log::set_logger(&REPORT).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
    panic::set_hook(Box::new(|panic| {
        eprintln!("nutshell fs: {panic}");
        process::abort();
    }));
}
