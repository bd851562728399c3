//! A disk with the keys of a Secret or ConfigMap as files, like the disks that KubeVirt makes of them.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use super::{
    image::{self, Contents, Label},
    keys::{self, KeysError, MAX_KEY_SIZE, MAX_NAMES},
};

/// The maximum size of all files together, in bytes: that of a seed with its four keys.
const MAX_SIZE: u64 = 4 * MAX_KEY_SIZE;

/// The maximum length of a name in bytes (Kubernetes, `DNS1123SubdomainMaxLength`). FAT allows 255.
const MAX_NAME: usize = 253;

/// Why a disk with files cannot be made. `directory` is a path on the host.
#[derive(Debug, thiserror::Error)]
pub(in crate::shim) enum FilesError {
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(
        "{}: more than {MAX_NAMES} names, the maximum for a disk with files, in which the names that begin with \"..\" \
         count too",
        directory.display()
    )]
    TooManyNames { directory: PathBuf },
    #[error(
        "the key {key:?} in {} cannot be the name of a file on the disk: it must have 1 to {MAX_NAME} ASCII letters, \
         digits, '-', '.' or '_', and not end with a dot",
        directory.display()
    )]
    Name { directory: PathBuf, key: String },
    #[error(
        "the keys {first:?} and {second:?} in {} differ only in upper and lower case, so a FAT file system cannot have \
         both",
        directory.display()
    )]
    SameName {
        directory: PathBuf,
        first: String,
        second: String,
    },
    #[error(
        "the keys in {} have more than {} KiB together, the maximum for a disk with files: {key:?} does not fit",
        directory.display(),
        MAX_SIZE >> 10
    )]
    TooLarge { directory: PathBuf, key: String },
    #[error("cannot make the image of the disk: {0}")]
    Image(#[source] io::Error),
}

/// Makes a disk with the keys in `directory`, which is open as `opened`, as files of its root directory. `name` is the
/// name of the disk, from which its label is made.
///
/// Returns a sealed memfd, like [`super::make_disk`]. Blocks on the file system of `directory`.
pub(in crate::shim::vm) fn make_disk_of_files(
    directory: &Path,
    opened: BorrowedFd<'_>,
    name: &str,
) -> Result<File, FilesError> {
    let read = || read_files(directory, opened);
    let files = keys::read_one_version(|| keys::current_version(opened), read).unwrap_or_else(|| {
        Err(FilesError::Keys(KeysError::Changing {
            directory: directory.to_owned(),
        }))
    })?;
    let contents = Contents {
        label: label(name),
        folder: &[],
        files,
    };
    image::write(&contents).map_err(FilesError::Image)
}

/// The label of the disk: its name in upper case, cut to the length of a label. A label has no dot.
fn label(name: &str) -> Label {
    let mut label = [b' '; 11];
    for (byte, character) in label.iter_mut().zip(name.bytes()) {
        *byte = match character {
            b'.' => b'_',
            other => other.to_ascii_uppercase(),
        };
    }
    label
}

fn read_files(directory: &Path, opened: BorrowedFd<'_>) -> Result<Vec<(String, Vec<u8>)>, FilesError> {
    let owned = || directory.to_owned();
    let names = keys::list(directory, opened)?.ok_or_else(|| FilesError::TooManyNames { directory: owned() })?;
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut size = 0;
    for key in names {
        let name = parse_name(&key).ok_or_else(|| FilesError::Name {
            directory: owned(),
            key: keys::printable(&key),
        })?;
        if let Some((first, _)) = files.iter().find(|(first, _)| first.eq_ignore_ascii_case(&name)) {
            return Err(FilesError::SameName {
                directory: owned(),
                first: first.clone(),
                second: name,
            });
        }
        let value = keys::read_key(directory, opened, &key)?;
        size += value.len() as u64;
        if size > MAX_SIZE {
            return Err(FilesError::TooLarge {
                directory: owned(),
                key: name,
            });
        }
        files.push((name, value));
    }
    Ok(files)
}

/// The name of a file, if Linux finds it on a FAT file system: it removes dots at the end of a name
/// (`vfat_striptail_len`).
fn parse_name(key: &CStr) -> Option<String> {
    let name = key.to_str().ok()?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let fits = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_plain) && !name.ends_with('.');
    fits.then(|| name.to_owned())
}
