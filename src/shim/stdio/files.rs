//! Fifos and files. Nothing here waits for the other end of a fifo.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// A fifo's ends: one for the machine, and one that the shim keeps.
#[derive(Debug)]
pub(super) struct Ends {
    /// For the machine.
    pub(super) machine: File,
    /// The other one, for the shim; a file has none.
    pub(super) own: Option<File>,
}

fn non_blocking() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// Opens a fifo for the machine to read from.
pub(super) fn open_input(path: &Path) -> io::Result<Ends> {
    let machine = non_blocking().read(true).open(path)?;
    let own = non_blocking().write(true).open(path)?;
    Ok(Ends {
        machine,
        own: Some(own),
    })
}

/// Opens a fifo, or what else is there, for the machine to write to.
pub(super) fn open_output(path: &Path) -> io::Result<Ends> {
    if !fs::metadata(path)?.file_type().is_fifo() {
        let machine = non_blocking().append(true).open(path)?;
        return Ok(Ends { machine, own: None });
    }
    // First, because a fifo without a reader cannot be opened for writing.
    let own = non_blocking().read(true).open(path)?;
    let machine = non_blocking().write(true).open(path)?;
    Ok(Ends {
        machine,
        own: Some(own),
    })
}

/// Opens a log for the machine to append to, and makes it if need be.
pub(super) fn open_log(path: &Path) -> io::Result<Ends> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let machine = non_blocking().append(true).create(true).mode(0o644).open(path)?;
    Ok(Ends { machine, own: None })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::shim::stdio::read_next;

    #[test]
    fn fifos_open_without_a_peer_and_a_reader_that_leaves_is_no_error() {
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
    fn input_ends_only_when_the_own_writer_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let Ends { mut machine, own } = open_input(&path).unwrap();
        for text in ["first", "second"] {
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            client.write_all(text.as_bytes()).unwrap();
        }
        let mut bytes = [0; 64];
        assert_eq!(machine.read(&mut bytes).unwrap(), 11);
        // Both clients are gone, and still it is not the end.
        assert_eq!(machine.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        drop(own);

        assert_eq!(read_next(&machine), b"");
    }

    #[test]
    fn log_that_is_a_fifo_nobody_reads_is_an_error_and_not_a_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert_eq!(open_log(&path).unwrap_err().raw_os_error(), Some(libc::ENXIO));
    }
}
