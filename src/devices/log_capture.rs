//! Captures log messages in tests.

use std::{
    sync::Once,
    thread::{self, ThreadId},
};

use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

/// Thread, target and text of each message, of all tests of this process.
static MESSAGES: Mutex<Vec<(ThreadId, String, String)>> = Mutex::new(Vec::new());

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let (target, text) = (record.target().to_owned(), record.args().to_string());
        MESSAGES.lock().push((thread::current().id(), target, text));
    }

    fn flush(&self) {}
}

/// The messages about one device, since the start of the capture.
#[derive(Debug)]
pub(crate) struct LogCapture {
    device: String,
    /// `None` for all threads.
    thread: Option<ThreadId>,
    start: usize,
}

impl LogCapture {
    /// Captures the messages whose target is `device`. Tests run at the same time, so no other test may use the name.
    pub(crate) fn start(device: &str) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            log::set_boxed_logger(Box::new(Logger)).unwrap();
            log::set_max_level(LevelFilter::Warn);
        });
        Self {
            device: device.to_owned(),
            thread: None,
            start: MESSAGES.lock().len(),
        }
    }

    /// Captures the messages of this thread whose target is `device`, for names that other tests use too.
    pub(crate) fn on_this_thread(device: &str) -> Self {
        Self {
            thread: Some(thread::current().id()),
            ..Self::start(device)
        }
    }

    /// The messages so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        let messages = MESSAGES.lock();
        let own = messages[self.start..]
            .iter()
            .filter(|(thread, target, _)| *target == self.device && self.thread.is_none_or(|own| own == *thread));
        own.map(|(_, _, text)| text.clone()).collect()
    }
}
