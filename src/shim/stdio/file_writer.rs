//! Appends a process's output to a file. A file system can block any write, and the vmm writes the output of all
//! processes of its pod on one thread. So the machine gets a pipe, and a thread of the shim copies it to the file.

use std::{
    fs::File,
    io::{self, PipeReader, Read, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    thread,
};

use tokio::sync::watch;

/// The most bytes that one write appends: the default capacity of a pipe.
const MAX_WRITE_SIZE: usize = 64 << 10;

/// The thread that writes one file. It ends after the pipe has, and its failures are logged.
#[derive(Debug)]
pub(super) struct FileWriter {
    /// The number of bytes that the file has. The thread drops the sender at its end.
    written: watch::Receiver<u64>,
}

impl FileWriter {
    /// Starts the thread. Returns the writing end of the pipe, for the machine. `path` is that of `file`, for messages.
    ///
    /// # Errors
    ///
    /// Those of pipe(2) and of the creation of a thread.
    pub(super) fn start(file: File, path: PathBuf) -> io::Result<(Self, OwnedFd)> {
        let (source, machine) = io::pipe()?;
        let (writing, written) = watch::channel(0);
        thread::Builder::new().name("output file".to_owned()).spawn(move || {
            // A failure closes the pipe, so that the process gets EPIPE instead of waiting for space in it.
            if let Err(error) = append(source, file, &writing) {
                log::error!(
                    "output of a process is lost, because {} cannot be written: {error}",
                    path.display()
                );
            }
        })?;
        Ok((Self { written }, machine.into()))
    }

    /// Waits until the file has `bytes` bytes of this process, or the thread has ended.
    pub(super) async fn delivered(&self, bytes: u64) {
        // An error means that the thread has ended.
        let _ = self.written.clone().wait_for(|count| *count >= bytes).await;
    }
}

/// Copies the pipe to the file until the pipe ends.
fn append(mut source: PipeReader, mut file: File, written: &watch::Sender<u64>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_WRITE_SIZE];
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        file.write_all(&buffer[..count])?;
        written.send_modify(|total| *total += count as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    /// A pipe, which blocks as a file of a hung file system does once it is full.
    fn hung_file() -> (PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, File::from(OwnedFd::from(writer)))
    }

    #[tokio::test]
    async fn all_bytes_are_in_the_file_once_they_are_delivered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before ").unwrap();
        let file = File::options().append(true).open(&path).unwrap();
        let (writer, machine) = FileWriter::start(file, path.clone()).unwrap();
        let text = "x".repeat(3 * MAX_WRITE_SIZE);

        let mut machine = File::from(machine);
        machine.write_all(text.as_bytes()).unwrap();
        writer.delivered(text.len() as u64).await;

        assert_eq!(fs::read_to_string(&path).unwrap(), format!("before {text}"));
        machine.write_all(b" last").unwrap();
        drop(machine);
        writer.delivered(u64::MAX).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("before {text} last"));
    }

    #[tokio::test]
    async fn hung_file_does_not_block_the_machine() {
        let (_unread, file) = hung_file();
        let (writer, machine) = FileWriter::start(file, "/hung/log".into()).unwrap();
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
    async fn full_file_system_closes_the_pipe() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (writer, machine) = FileWriter::start(full, "/dev/full".into()).unwrap();
        let mut machine = File::from(machine);
        machine.write_all(b"x").unwrap();

        writer.delivered(1).await;

        let error = machine.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
