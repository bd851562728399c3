//! The client's ends of the stdio fifos of a process.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, FileType, Mode, OFlags},
};

use crate::TIMEOUT;

/// Creates a fifo.
///
/// # Panics
///
/// If it cannot be created.
pub fn make_fifo(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o700), 0).unwrap();
}

/// The read end of a fifo. It is open before the shim opens the write end, and a thread reads it to the end.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    /// Creates the fifo and starts to read it.
    pub fn open(path: PathBuf) -> Self {
        make_fifo(&path);
        let fifo = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&path)
            .unwrap();
        let shared = Arc::<(Mutex<Collected>, Condvar)>::default();
        let collected = shared.clone();
        std::thread::spawn(move || collect(fifo, &collected));
        Self { path, shared }
    }

    /// The path of the fifo.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the output contains `text`, and returns the output so far.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait_until(&format!("{text:?}"), |collected| {
            String::from_utf8_lossy(&collected.bytes).contains(text)
        })
    }

    /// Waits until every writer has closed the fifo, and returns all output.
    pub fn read_to_end(&self) -> String {
        self.wait_until("the end", |collected| collected.ended)
    }

    /// What was read from the fifo until now, as text.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().unwrap().bytes).into_owned()
    }

    fn wait_until(&self, what: &str, is_met: impl Fn(&Collected) -> bool) -> String {
        let (lock, changed) = &*self.shared;
        let waited = changed.wait_timeout_while(lock.lock().unwrap(), TIMEOUT, |collected| !is_met(collected));
        let (collected, timeout) = waited.unwrap();
        let text = String::from_utf8_lossy(&collected.bytes).into_owned();
        drop(collected);
        assert!(
            !timeout.timed_out(),
            "{}: no {what} within {TIMEOUT:?}, only {text:?}",
            self.path.display()
        );
        text
    }
}

impl Drop for Output {
    /// Ends the thread even if no writer ever opened the fifo: opens and closes the write end.
    fn drop(&mut self) {
        let _ = OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&self.path);
    }
}

fn collect(mut fifo: File, (lock, changed): &(Mutex<Collected>, Condvar)) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        // poll(2) reports the end when the last writer closes the fifo, and not before the first writer opens it
        // (fifo(7)).
        poll(&mut [PollFd::new(&fifo, PollFlags::IN)], None).unwrap();
        match fifo.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => lock.lock().unwrap().bytes.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("read a fifo: {error}"),
        }
        changed.notify_all();
    }
    lock.lock().unwrap().ended = true;
    changed.notify_all();
}

/// The write end of a standard input fifo.
#[derive(Debug)]
pub struct Input(File);

impl Input {
    /// Opens the fifo, which blocks until the shim has opened the read end.
    pub fn open(path: &Path) -> Self {
        Self(OpenOptions::new().write(true).open(path).unwrap())
    }

    /// Writes all of `text`.
    pub fn write(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }
}
