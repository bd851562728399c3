//! Appends a process's output to a file. A file system can block any operation on the file. The vmm writes the output
//! of all processes of its pod on one thread, so it gets a pipe, and a thread of the shim copies that to the file.
//!
//! The thread has its own descriptor table, and only that has the file. The shim forks, and each child closes the
//! descriptors that it inherits. With some file systems (FUSE, NFS) that writes the file back, so a child that had the
//! file could hang too. And a hung thread that shared the shim's table would keep the shim's connections open after the
//! end of the shim.
//!
//! So the code that runs on the thread owns each descriptor that it uses. It does not log and does not wake a Tokio
//! task: both use descriptors of the shim. It reports over a pipe.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::mpsc,
    thread,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::unix::pipe::Receiver,
    sync::watch,
};

use crate::shim::descriptor_table::leave_shared_table;

/// The most bytes that one write appends: the default capacity of a pipe.
const MAX_WRITE_SIZE: usize = 64 << 10;

/// How many bytes of reports are read at once.
const REPORT_BUFFER_SIZE: usize = 512;

/// The thread that writes one file. It ends after the machine's pipe has, and its failures are logged.
#[derive(Debug)]
pub(super) struct FileWriter {
    /// The number of bytes that the file has. The sender is dropped when the thread ends.
    written: watch::Receiver<u64>,
}

/// A message of the thread: the bytes that a write appended or, as the last message, the negative errno of a failure.
type Report = i64;

impl FileWriter {
    /// Starts the thread, which opens the file at `path` by `open`, and waits for that. Returns the writing end of the
    /// pipe, for the machine. Needs the Tokio runtime.
    ///
    /// # Errors
    ///
    /// Those of `open`, of pipe(2), of close_range(2), and of the creation of a thread.
    pub(super) fn start(
        path: PathBuf,
        open: impl FnOnce() -> io::Result<File> + Send + 'static,
    ) -> io::Result<(Self, OwnedFd)> {
        let (output, machine) = io::pipe()?;
        let (reports, reporter) = io::pipe()?;
        let (opened_by_thread, opened) = mpsc::sync_channel(1);
        let numbers = (output.as_raw_fd(), reporter.as_raw_fd());
        thread::Builder::new().name("output file".to_owned()).spawn(move || {
            match prepare(numbers.0, numbers.1, open) {
                Ok((output, reporter, file)) => {
                    // Fails if the shim has given up; then the pipe has ended.
                    let _ = opened_by_thread.send(Ok(()));
                    append(output, reporter, file);
                }
                Err(error) => {
                    let _ = opened_by_thread.send(Err(error));
                }
            }
        })?;
        opened.recv().map_err(io::Error::other)??;
        // The thread has both ends now.
        drop((output, reporter));
        let reports = Receiver::from_owned_fd(reports.into())?;
        let (writing, written) = watch::channel(0);
        tokio::spawn(async move {
            if let Err(error) = receive(reports, &writing).await {
                log::error!(
                    "output of a process is lost, because {} cannot be written: {error}",
                    path.display()
                );
            }
        });
        Ok((Self { written }, machine.into()))
    }

    /// Waits until the file has `bytes` bytes of this process, or the thread has ended.
    pub(super) async fn delivered(&self, bytes: u64) {
        // An error means that the thread has ended.
        let _ = self.written.clone().wait_for(|count| *count >= bytes).await;
    }
}

/// Receives the reports of the thread until it ends.
async fn receive(reports: Receiver, written: &watch::Sender<u64>) -> io::Result<()> {
    let mut reports = BufReader::with_capacity(REPORT_BUFFER_SIZE, reports);
    loop {
        match reports.read_i64_le().await {
            Ok(report) => match u64::try_from(report) {
                Ok(count) => written.send_modify(|total| *total += count),
                Err(_) => {
                    let errno = i32::try_from(-report).unwrap_or(libc::EIO);
                    return Err(io::Error::from_raw_os_error(errno));
                }
            },
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Gives this thread its own descriptor table, and opens in it: the output of the process, the pipe for reports, and
/// the file. The first two are named by their numbers in the shim's table.
fn prepare(output: i32, reporter: i32, open: impl FnOnce() -> io::Result<File>) -> io::Result<(File, File, File)> {
    // SAFETY: this thread has used no descriptor yet, and uses only those that it opens below.
    unsafe { leave_shared_table() }?;
    // `/proc/self` is the main thread, which has the shim's table. The opened ends are blocking.
    let end = |number: i32, access| {
        let opened = rustix::fs::open(
            format!("/proc/self/fd/{number}"),
            access | OFlags::CLOEXEC,
            Mode::empty(),
        );
        opened.map(File::from)
    };
    let output = end(output, OFlags::RDONLY)?;
    let reporter = end(reporter, OFlags::WRONLY)?;
    Ok((output, reporter, open()?))
}

/// Copies the output to the file until the output ends. A failure closes the output, so that the process gets EPIPE
/// instead of waiting for space in the pipe.
fn append(mut output: File, mut reporter: File, mut file: File) {
    let mut buffer = vec![0; MAX_WRITE_SIZE];
    let mut copy = || -> io::Result<Report> {
        let count = output.read(&mut buffer)?;
        file.write_all(&buffer[..count])?;
        Ok(Report::try_from(count).unwrap_or(Report::MAX))
    };
    loop {
        let report = match copy() {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let report = -Report::from(error.raw_os_error().unwrap_or(libc::EIO));
                // Before the report: once it is received, no more output is accepted.
                drop(output);
                // Fails only without a receiver: at the end of the shim.
                let _ = reporter.write_all(&report.to_le_bytes());
                return;
            }
        };
        // As above.
        if reporter.write_all(&report.to_le_bytes()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::fd::{AsFd, BorrowedFd},
        time::Duration,
    };

    use super::*;

    /// Opens a pipe, which blocks as a file of a hung file system does once it is full.
    fn hung_file(pipe: BorrowedFd<'_>) -> impl FnOnce() -> io::Result<File> + use<> {
        let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
        move || File::options().write(true).open(path)
    }

    fn full_file() -> io::Result<File> {
        File::options().write(true).open("/dev/full")
    }

    #[tokio::test]
    async fn all_bytes_are_in_the_file_once_they_are_delivered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before ").unwrap();
        let opened = path.clone();
        let (writer, machine) = FileWriter::start(path.clone(), || File::options().append(true).open(opened)).unwrap();
        let text = "x".repeat(3 * MAX_WRITE_SIZE);

        let mut machine = File::from(machine);
        let writing = text.clone();
        let machine = tokio::task::spawn_blocking(move || {
            machine.write_all(writing.as_bytes()).unwrap();
            machine
        });
        let mut machine = machine.await.unwrap();
        writer.delivered(text.len() as u64).await;

        assert_eq!(fs::read_to_string(&path).unwrap(), format!("before {text}"));
        machine.write_all(b" last").unwrap();
        drop(machine);
        writer.delivered(u64::MAX).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("before {text} last"));
    }

    #[tokio::test]
    async fn hung_file_does_not_block_the_machine() {
        let (unread, _unwritten) = io::pipe().unwrap();
        let (writer, machine) = FileWriter::start("/hung/log".into(), hung_file(unread.as_fd())).unwrap();
        rustix::io::ioctl_fionbio(&machine, true).unwrap();
        let mut machine = File::from(machine);

        // The writes end although the file takes no more: the pipe is full then.
        let mut accepted = 0;
        loop {
            match machine.write(&[b'x'; 4096]) {
                Ok(count) => accepted += count as u64,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    let delivered = writer.delivered(accepted);
                    if tokio::time::timeout(Duration::from_millis(200), delivered)
                        .await
                        .is_err()
                    {
                        break;
                    }
                }
            }
        }

        assert!(accepted > MAX_WRITE_SIZE as u64, "{accepted} bytes");
    }

    #[tokio::test]
    async fn file_is_not_among_the_descriptors_of_the_shim() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let opened = path.clone();
        let (writer, machine) =
            FileWriter::start(path.clone(), || File::options().append(true).create(true).open(opened)).unwrap();

        let descriptors = fs::read_dir("/proc/self/fd").unwrap();
        let files: Vec<_> = descriptors
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .collect();

        assert!(!files.contains(&path), "{files:?}");
        drop(machine);
        writer.delivered(u64::MAX).await;
    }

    #[tokio::test]
    async fn full_file_system_closes_the_pipe() {
        let (writer, machine) = FileWriter::start("/dev/full".into(), full_file).unwrap();
        let mut machine = File::from(machine);
        machine.write_all(b"x").unwrap();

        writer.delivered(1).await;

        let error = machine.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn file_that_cannot_be_opened_is_an_error() {
        let failed = FileWriter::start("/no/such/log".into(), || File::open("/no/such/log"));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
