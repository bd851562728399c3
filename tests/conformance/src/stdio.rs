//! The client's ends of the fifos of a process.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
};

use rustix::fs::{CWD, FileType, Mode};

use crate::PATIENCE;

/// Makes a fifo.
pub fn make_fifo(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o700), 0).unwrap();
}

/// A fifo that a thread reads, from before the shim opens it (as containerd does) to its end.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    opened: bool,
    ended: bool,
}

impl Output {
    /// Makes the fifo and begins to read it.
    pub fn open(path: PathBuf) -> Self {
        make_fifo(&path);
        let output = Self {
            path: path.clone(),
            shared: Arc::default(),
        };
        let shared = output.shared.clone();
        std::thread::spawn(move || collect(&path, &shared));
        output
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
    /// Frees a reader whose fifo nobody ever opened.
    fn drop(&mut self) {
        if let Ok(own) = OpenOptions::new().read(true).write(true).open(&self.path) {
            let (lock, changed) = &*self.shared;
            let opened = changed.wait_timeout_while(lock.lock().unwrap(), PATIENCE, |collected| !collected.opened);
            drop((own, opened));
        }
    }
}

fn collect(path: &Path, shared: &(Mutex<Collected>, Condvar)) {
    let (lock, changed) = shared;
    let file = File::open(path);
    lock.lock().unwrap().opened = true;
    changed.notify_all();
    let mut buffer = vec![0; 64 << 10];
    if let Ok(mut file) = file {
        while let Ok(read @ 1..) = file.read(&mut buffer) {
            lock.lock().unwrap().bytes.extend_from_slice(&buffer[..read]);
            changed.notify_all();
        }
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
