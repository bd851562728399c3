//! Opens fifos and files. Nothing here waits for the other end of a fifo.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use super::file_writer::FileWriter;

/// An opened fifo for standard input.
#[derive(Debug)]
pub(super) struct InputEnds {
    /// The end that the machine reads from.
    pub(super) machine: OwnedFd,
    /// The writing end, which the shim keeps open.
    pub(super) writer: File,
}

/// An opened fifo or file for an output.
#[derive(Debug)]
pub(super) struct OutputEnds {
    /// The end that the machine writes to. A write to it does not wait for a file system.
    pub(super) machine: OwnedFd,
    pub(super) opposite: OppositeEnd,
}

/// What the shim keeps of an output.
#[derive(Debug)]
pub(super) enum OppositeEnd {
    /// The reading end of a fifo.
    Fifo(File),
    /// The thread that writes the file.
    File(FileWriter),
    /// A device, such as a terminal, that the machine writes directly.
    None,
}

fn non_blocking() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// Opens a fifo for the machine to read from.
pub(super) fn open_input(path: &Path) -> io::Result<InputEnds> {
    let machine = non_blocking().read(true).open(path)?.into();
    let writer = non_blocking().write(true).open(path)?;
    Ok(InputEnds { machine, writer })
}

/// Opens a fifo for the machine to write to. Any other file at `path` is appended to.
pub(super) fn open_output(path: &Path) -> io::Result<OutputEnds> {
    let file_type = fs::metadata(path)?.file_type();
    if !file_type.is_fifo() {
        let mut options = non_blocking();
        options.append(true);
        return open_file(path, options, file_type.is_char_device());
    }
    // First, because a fifo without a reader cannot be opened for writing.
    let reader = non_blocking().read(true).open(path)?;
    let machine = non_blocking().write(true).open(path)?.into();
    Ok(OutputEnds {
        machine,
        opposite: OppositeEnd::Fifo(reader),
    })
}

/// Opens a log file for the machine to append to. Creates it and its parent directories if they are missing.
pub(super) fn open_log(path: &Path) -> io::Result<OutputEnds> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let is_direct = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type().is_fifo() || metadata.file_type().is_char_device(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let mut options = non_blocking();
    options.append(true).create(true).mode(0o644);
    open_file(path, options, is_direct)
}

/// Opens a file for the machine to write to. `is_direct`: it is a device or fifo, whose writes do not block because of
/// `O_NONBLOCK`. A file on a file system blocks nevertheless, so a thread writes it.
fn open_file(path: &Path, options: OpenOptions, is_direct: bool) -> io::Result<OutputEnds> {
    if is_direct {
        return Ok(OutputEnds {
            machine: options.open(path)?.into(),
            opposite: OppositeEnd::None,
        });
    }
    let opened = path.to_owned();
    let (writer, machine) = FileWriter::start(path.to_owned(), move || options.open(opened))?;
    Ok(OutputEnds {
        machine,
        opposite: OppositeEnd::File(writer),
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
        let OutputEnds { machine, opposite } = open_output(&path).unwrap();
        let mut machine = File::from(machine);

        let reader = non_blocking().read(true).open(&path).unwrap();
        machine.write_all(b"a").unwrap();
        drop(reader);
        machine.write_all(b"b").unwrap();

        let mut reader = File::open(&path).unwrap();
        drop((machine, opposite));
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"ab");
    }

    #[test]
    fn input_fifo_ends_only_when_the_shim_closes_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let InputEnds { machine, writer } = open_input(&path).unwrap();
        let mut machine = File::from(machine);
        for text in ["first", "second"] {
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            client.write_all(text.as_bytes()).unwrap();
        }
        let mut bytes = [0; 64];
        assert_eq!(machine.read(&mut bytes).unwrap(), 11);
        // Both clients have closed it, and it has not ended.
        assert_eq!(machine.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        drop(writer);

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
