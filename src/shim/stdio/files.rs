//! Opens fifos and files. Nothing here waits for the other end of a fifo.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// An opened fifo or file.
#[derive(Debug)]
pub(super) struct FileEnds {
    /// The end that the machine reads from or writes to.
    pub(super) machine: File,
    /// The opposite end of a fifo, which the shim keeps open. `None` for a file.
    pub(super) opposite: Option<File>,
}

fn non_blocking() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// Opens a fifo for the machine to read from.
pub(super) fn open_input(path: &Path) -> io::Result<FileEnds> {
    let machine = non_blocking().read(true).open(path)?;
    let writer = non_blocking().write(true).open(path)?;
    Ok(FileEnds {
        machine,
        opposite: Some(writer),
    })
}

/// Opens a fifo for the machine to write to. Any other file at `path` is appended to.
pub(super) fn open_output(path: &Path) -> io::Result<FileEnds> {
    if !fs::metadata(path)?.file_type().is_fifo() {
        let machine = non_blocking().append(true).open(path)?;
        return Ok(FileEnds {
            machine,
            opposite: None,
        });
    }
    // First, because a fifo without a reader cannot be opened for writing.
    let reader = non_blocking().read(true).open(path)?;
    let machine = non_blocking().write(true).open(path)?;
    Ok(FileEnds {
        machine,
        opposite: Some(reader),
    })
}

/// Opens a log file for the machine to append to. Creates it and its parent directories if they are missing.
pub(super) fn open_log(path: &Path) -> io::Result<FileEnds> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let machine = non_blocking().append(true).create(true).mode(0o644).open(path)?;
    Ok(FileEnds {
        machine,
        opposite: None,
    })
}

/// Reads the next bytes from a pipe, none at its end. A child process that another test is starting has copies of this
/// process's descriptors until it executes its program, so the end of a pipe may come late; this waits for it.
#[cfg(test)]
pub(crate) fn read_next(pipe: &File) -> Vec<u8> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use std::{io::Read, time::Duration};
    let mut pipe = pipe.try_clone().unwrap();
    fcntl_setfl(&pipe, fcntl_getfl(&pipe).unwrap() - OFlags::NONBLOCK).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        let count = pipe.read(&mut bytes).unwrap();
        sender.send(bytes[..count].to_vec())
    });
    let read = receiver.recv_timeout(Duration::from_secs(20));
    read.expect("bytes or the end of a pipe")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn output_fifo_opens_without_a_reader_and_survives_one_that_leaves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut ends = open_output(&path).unwrap();

        let reader = non_blocking().read(true).open(&path).unwrap();
        ends.machine.write_all(b"a").unwrap();
        drop(reader);
        ends.machine.write_all(b"b").unwrap();

        let mut reader = File::open(&path).unwrap();
        drop(ends.machine);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"ab");
    }

    #[test]
    fn input_fifo_ends_only_when_the_shim_closes_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let FileEnds { mut machine, opposite } = open_input(&path).unwrap();
        for text in ["first", "second"] {
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            client.write_all(text.as_bytes()).unwrap();
        }
        let mut bytes = [0; 64];
        assert_eq!(machine.read(&mut bytes).unwrap(), 11);
        // Both clients have closed it, and it has not ended.
        assert_eq!(machine.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        drop(opposite);

        assert_eq!(read_next(&machine), b"");
    }

    #[test]
    fn log_that_is_a_fifo_without_a_reader_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert_eq!(open_log(&path).unwrap_err().raw_os_error(), Some(libc::ENXIO));
    }
}
