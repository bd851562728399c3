//! Opens regular files in directories that a guest or a user may have written.
//!
//! Opening a device node can have effects, such as starting a watchdog of the host, and opening a fifo can block. So a
//! file is first looked up with `O_PATH`, which does not open it, and checked. Then that same file is opened, even if
//! its name refers to another file by then.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat},
    io::Errno,
    path::Arg,
};

/// Why a file is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum OpenError {
    #[error("{}", io::Error::from(*.0))]
    System(#[from] Errno),
    /// The value is the kind of the file ([`describe`]).
    #[error("it is {0}, not a regular file")]
    NotRegular(&'static str),
}

/// Opens the regular file `path` below `directory`. `access` is `RDONLY` or `RDWR`. If `resolve` has `NO_SYMLINKS`,
/// `path` must not be a symbolic link.
pub(super) fn open_regular(
    directory: impl AsFd,
    path: impl Arg,
    resolve: ResolveFlags,
    access: OFlags,
) -> Result<File, OpenError> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if resolve.contains(ResolveFlags::NO_SYMLINKS) {
        // The link itself is found then, so the error names the kind of file.
        flags |= OFlags::NOFOLLOW;
    }
    let found = rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve)?;
    let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(OpenError::NotRegular(describe(kind)));
    }
    // Without O_NONBLOCK, opening a file that another process leases waits for that process.
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let same_file = format!("/proc/thread-self/fd/{}", found.as_raw_fd());
    Ok(rustix::fs::openat(CWD, same_file, flags, Mode::empty())?.into())
}

/// The kind of a file that is not regular, in messages.
pub(super) fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Symlink => "a symbolic link",
        FileType::Directory => "a directory",
        FileType::BlockDevice | FileType::CharacterDevice => "a device node",
        FileType::Fifo => "a fifo",
        FileType::Socket => "a socket",
        _ => "a special file",
    }
}
