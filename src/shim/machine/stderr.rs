//! The standard error of the processes that serve a guest.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, task::JoinHandle};

use super::console::printable_tail;

/// How much of a process's standard error is kept and logged, in bytes. The limit is for a guest that has compromised
/// the process: it can write any amount.
const MAX_LOGGED_STDERR: usize = 16 << 10;

/// How long to wait for the end of standard error of a process that has ended. A process that it has forked can keep
/// the stream open.
pub(crate) const STDERR_TIMEOUT: Duration = Duration::from_millis(200);

/// Reads and logs the standard error of a process until end of file, until [`Self::finish`], or until it is dropped.
/// The process then cannot write to it any more.
#[derive(Debug)]
pub(crate) struct StderrLog {
    reader: JoinHandle<()>,
    /// The first [`MAX_LOGGED_STDERR`] bytes. The rest is dropped.
    kept: Arc<Mutex<Vec<u8>>>,
}

impl StderrLog {
    /// Starts reading. `process` is what the log calls the process, and `pid` its pid. Needs the Tokio runtime.
    pub(crate) fn start(stderr: OwnedFd, process: &'static str, pid: u32) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let reader = tokio::spawn({
            let kept = kept.clone();
            async move {
                match Receiver::from_owned_fd(stderr) {
                    Ok(stderr) => read(stderr, process, pid, &kept).await,
                    Err(error) => log::warn!("cannot read the standard error of {process} process {pid}: {error}"),
                }
            }
        });
        Self { reader, kept }
    }

    /// Waits for end of file, for at most `limit`: another process may keep the stream open. Returns the end of what
    /// was read.
    pub(crate) async fn finish(mut self, limit: Duration) -> String {
        // After the limit the reader is aborted. It does not panic.
        let _ = tokio::time::timeout(limit, &mut self.reader).await;
        printable_tail(&self.kept.lock())
    }
}

impl Drop for StderrLog {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn read(mut stderr: Receiver, process: &str, pid: u32, kept: &Mutex<Vec<u8>>) {
    let mut bytes = [0; 1024];
    while let Ok(length @ 1..) = stderr.read(&mut bytes).await {
        let room = MAX_LOGGED_STDERR - kept.lock().len();
        let new = &bytes[..length.min(room)];
        for line in printable_tail(new).lines() {
            log::warn!("{process} process {pid}: {line}");
        }
        kept.lock().extend_from_slice(new);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        thread,
    };

    use super::*;

    #[tokio::test]
    async fn any_amount_is_read_and_a_bounded_part_kept() {
        let (stderr, mut writer) = io::pipe().unwrap();
        let log = StderrLog::start(stderr.into(), "test", 1);
        let kept = log.kept.clone();
        // More than a pipe holds: the writer would block if the rest were not read.
        let writing = thread::spawn(move || writer.write_all(&[b'a'; 4 << 20]).unwrap());

        let text = log.finish(Duration::from_secs(20)).await;

        writing.join().unwrap();
        assert_eq!((text.len(), kept.lock().len()), (MAX_LOGGED_STDERR, MAX_LOGGED_STDERR));
    }

    #[tokio::test]
    async fn writer_that_stays_does_not_hold_up_the_end_and_the_text_is_returned() {
        let (stderr, mut writer) = io::pipe().unwrap();
        let log = StderrLog::start(stderr.into(), "test", 1);
        writer.write_all(b"the reason").unwrap();

        let text = log.finish(Duration::from_millis(50)).await;

        assert_eq!(text, "the reason");
        // The reading end is closed once the aborted task is dropped.
        while writer.write_all(b"more").is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
