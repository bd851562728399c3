//! The client's ends of the fifos of a process.

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

use crate::PATIENCE;

/// Makes a fifo.
pub fn make_fifo(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o700), 0).unwrap();
}

/// A fifo that is open from before the shim opens it, and that a thread reads to its end.
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
    /// Makes the fifo and begins to read it.
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

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until `wanted` was written; all that came until then.
    pub fn with(&self, wanted: &str) -> String {
        self.when(&format!("{wanted:?}"), |collected| {
            String::from_utf8_lossy(&collected.bytes).contains(wanted)
        })
    }

    /// Waits until every writer has closed it; all that came.
    pub fn all(&self) -> String {
        self.when("the end", |collected| collected.ended)
    }

    /// What came so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().unwrap().bytes).into_owned()
    }

    fn when(&self, what: &str, wanted: impl Fn(&Collected) -> bool) -> String {
        let (lock, changed) = &*self.shared;
        let waited = changed.wait_timeout_while(lock.lock().unwrap(), PATIENCE, |collected| !wanted(collected));
        let (collected, timeout) = waited.unwrap();
        let text = String::from_utf8_lossy(&collected.bytes).into_owned();
        drop(collected);
        assert!(
            !timeout.timed_out(),
            "{}: {what} did not come, but {text:?}",
            self.path.display()
        );
        text
    }
}

impl Drop for Output {
    /// Frees a reader whose fifo nobody ever opened: a writer comes and goes.
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
        // A fifo hangs up when its last writer goes, not while there was none (poll(2), fifo(7)).
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

/// The writing end of a standard input.
#[derive(Debug)]
pub struct Input(File);

impl Input {
    /// Opens the fifo, whose reader the shim has.
    pub fn open(path: &Path) -> Self {
        Self(OpenOptions::new().write(true).open(path).unwrap())
    }

    /// Writes all of it.
    pub fn write(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }
}
