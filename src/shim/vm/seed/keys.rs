//! Reads the keys of a seed or of a disk with files: the files in the directory of a Secret or ConfigMap.
//!
//! The kubelet replaces all keys at once: each key is a symbolic link through the link `..data`, which the kubelet
//! points to a new directory (Kubernetes, `pkg/volume/util/atomic_writer.go`). But the directory can be any volume, and
//! a guest may have written it. So nothing outside of it is reached, and each loop and each size has a limit.

use std::{
    ffi::{CStr, CString},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags};

use crate::shim::vm::regular_file::{OpenError, open_regular};

/// The maximum size of a value, in bytes. All values of a Secret or ConfigMap together have at most 1 MiB (Kubernetes,
/// `MaxSecretSize`).
pub(super) const MAX_KEY_SIZE: u64 = 1 << 20;
/// The maximum number of names in the directory. The kubelet makes three besides the keys.
pub(super) const MAX_NAMES: usize = 64;
/// The names of keys, for error texts.
const ACCEPTED_KEYS: &str = "user-data, meta-data, vendor-data and network-config";

/// The kubelet's link to the directory with the current keys.
pub(in crate::shim::vm) const CURRENT_VERSION: &CStr = c"..data";
/// The maximum number of attempts to read the keys. The kubelet replaces them about once a minute, and only if they
/// changed.
const MAX_ATTEMPTS: usize = 3;

/// Why the keys cannot be read. `directory` is a path on the host.
#[derive(Debug, thiserror::Error)]
pub(in crate::shim) enum KeysError {
    #[error("cannot read the directory {}: {source}", directory.display())]
    Directory { directory: PathBuf, source: io::Error },
    #[error(
        "{}: more than {MAX_NAMES} names: a seed has only the keys {ACCEPTED_KEYS}",
        directory.display()
    )]
    TooManyNames { directory: PathBuf },
    #[error("{}: unknown key {key:?}: a seed has only the keys {ACCEPTED_KEYS}", directory.display())]
    UnknownKey { directory: PathBuf, key: String },
    #[error("{}: the keys {first:?} and {second:?} mean the same: remove one", directory.display())]
    SameKey {
        directory: PathBuf,
        first: String,
        second: String,
    },
    #[error(
        "{}: no user data: add the key user-data to the Secret or ConfigMap (its value may be empty)",
        directory.display()
    )]
    NoUserData { directory: PathBuf },
    #[error(
        "cannot open the key {key:?} in {}: {source} (symbolic links are resolved inside of the directory only)",
        directory.display()
    )]
    Open {
        directory: PathBuf,
        key: String,
        source: io::Error,
    },
    #[error("the key {key:?} in {} is {kind}: it must be a regular file", directory.display())]
    NotRegular {
        directory: PathBuf,
        key: String,
        kind: &'static str,
    },
    #[error("cannot read the key {key:?} in {}: {source}", directory.display())]
    Read {
        directory: PathBuf,
        key: String,
        source: io::Error,
    },
    #[error(
        "the key {key:?} in {} is larger than {} KiB, the size limit of a Secret and of a ConfigMap",
        directory.display(),
        MAX_KEY_SIZE >> 10
    )]
    TooLarge { directory: PathBuf, key: String },
    #[error("{}: the keys were replaced several times while they were read: try again", directory.display())]
    Changing { directory: PathBuf },
}

/// What the user provides for cloud-init, each from the key of that name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) user_data: Vec<u8>,
    pub(super) meta_data: Option<Vec<u8>>,
    pub(super) vendor_data: Option<Vec<u8>>,
    pub(super) network_config: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    UserData,
    MetaData,
    VendorData,
    NetworkConfig,
}

impl Key {
    /// Accepts cloud-init's names and those of KubeVirt.
    fn parse(name: &CStr) -> Option<Self> {
        match name.to_bytes() {
            b"user-data" | b"userdata" | b"userData" => Some(Self::UserData),
            b"meta-data" | b"metadata" => Some(Self::MetaData),
            b"vendor-data" | b"vendordata" => Some(Self::VendorData),
            b"network-config" | b"networkdata" | b"networkData" => Some(Self::NetworkConfig),
            _ => None,
        }
    }
}

/// A directory with keys that is found and not opened yet. The user who may read the keys need not be able to look it
/// up: the kubelet's folders are closed to other users.
#[derive(Debug)]
pub(in crate::shim) struct KeyDirectory {
    path: PathBuf,
    found: OwnedFd,
}

impl KeyDirectory {
    /// Looks up the directory. Can block.
    ///
    /// # Errors
    ///
    /// [`KeysError::Directory`].
    pub(in crate::shim) fn find(path: &Path) -> Result<Self, KeysError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
            Ok(found) => Ok(Self {
                path: path.to_owned(),
                found,
            }),
            Err(error) => Err(unusable(path)(error)),
        }
    }
}

fn unusable(directory: &Path) -> impl FnOnce(rustix::io::Errno) -> KeysError {
    move |error| KeysError::Directory {
        directory: directory.to_owned(),
        source: error.into(),
    }
}

/// Reads the keys in `directory`. All of them are from one version of the Secret or ConfigMap. Can block.
pub(super) fn read(directory: &KeyDirectory) -> Result<Keys, KeysError> {
    let KeyDirectory { path: directory, found } = directory;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(found, ".", flags, Mode::empty()).map_err(unusable(directory))?;
    let version = || current_version(opened.as_fd());
    read_one_version(version, || read_all(directory, opened.as_fd())).unwrap_or_else(|| {
        Err(KeysError::Changing {
            directory: directory.to_owned(),
        })
    })
}

/// The target of the kubelet's link. An error means that there is no such link. If the file system fails, reading the
/// keys reports that.
pub(super) fn current_version(opened: BorrowedFd<'_>) -> Option<CString> {
    rustix::fs::readlinkat(opened, CURRENT_VERSION, Vec::new()).ok()
}

/// Calls `read` until the version is the same before and after it. `None` if it changes each time.
pub(super) fn read_one_version<T, V: PartialEq>(version: impl Fn() -> V, mut read: impl FnMut() -> T) -> Option<T> {
    (0..MAX_ATTEMPTS).find_map(|_| {
        let before = version();
        let result = read();
        (version() == before).then_some(result)
    })
}

fn read_all(directory: &Path, opened: BorrowedFd<'_>) -> Result<Keys, KeysError> {
    let mut found: Vec<(Key, CString, Vec<u8>)> = Vec::new();
    let names = list(directory, opened)?.ok_or_else(|| KeysError::TooManyNames {
        directory: directory.to_owned(),
    })?;
    for name in names {
        let Some(key) = Key::parse(&name) else {
            return Err(KeysError::UnknownKey {
                directory: directory.to_owned(),
                key: printable(&name),
            });
        };
        if let Some((_, first, _)) = found.iter().find(|(other, ..)| *other == key) {
            return Err(KeysError::SameKey {
                directory: directory.to_owned(),
                first: printable(first),
                second: printable(&name),
            });
        }
        let value = read_key(directory, opened, &name)?;
        found.push((key, name, value));
    }
    let mut take = |key| {
        let index = found.iter().position(|(other, ..)| *other == key)?;
        Some(found.swap_remove(index).2)
    };
    Ok(Keys {
        user_data: take(Key::UserData).ok_or_else(|| KeysError::NoUserData {
            directory: directory.to_owned(),
        })?,
        meta_data: take(Key::MetaData),
        vendor_data: take(Key::VendorData),
        network_config: take(Key::NetworkConfig),
    })
}

/// The names in the directory that can be keys, in order. No key begins with `..` (Kubernetes, `IsConfigMapKey`).
/// `None` if the directory has more than [`MAX_NAMES`] names.
pub(super) fn list(directory: &Path, opened: BorrowedFd<'_>) -> Result<Option<Vec<CString>>, KeysError> {
    let failed = |error: rustix::io::Errno| KeysError::Directory {
        directory: directory.to_owned(),
        source: error.into(),
    };
    let mut names = Vec::new();
    let mut count = 0;
    for entry in Dir::read_from(opened).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        count += 1;
        if count > MAX_NAMES {
            return Ok(None);
        }
        if !name.to_bytes().starts_with(b"..") {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(Some(names))
}

pub(super) fn read_key(directory: &Path, opened: BorrowedFd<'_>, name: &CStr) -> Result<Vec<u8>, KeysError> {
    let path = || (directory.to_owned(), printable(name));
    let open_error = |source: io::Error| {
        let (directory, key) = path();
        KeysError::Open { directory, key, source }
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = open_regular(opened, name, resolve, OFlags::RDONLY).map_err(|error| match error {
        OpenError::System(errno) => open_error(errno.into()),
        OpenError::NotRegular(kind) => {
            let (directory, key) = path();
            KeysError::NotRegular { directory, key, kind }
        }
    })?;
    let mut value = Vec::new();
    file.take(MAX_KEY_SIZE + 1).read_to_end(&mut value).map_err(|source| {
        let (directory, key) = path();
        KeysError::Read { directory, key, source }
    })?;
    if value.len() as u64 > MAX_KEY_SIZE {
        let (directory, key) = path();
        return Err(KeysError::TooLarge { directory, key });
    }
    Ok(value)
}

/// A name in error texts.
pub(super) fn printable(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        fs::{self, File},
        os::unix::{ffi::OsStrExt, fs::symlink, net::UnixListener},
    };

    use nix::sys::stat::{Mode as FileMode, SFlag, makedev, mknod};
    use tempfile::{TempDir, tempdir};

    use super::*;

    fn read(directory: &Path) -> Result<Keys, KeysError> {
        super::read(&KeyDirectory::find(directory)?)
    }
    use crate::shim::vm::seed::tests::publish;

    /// A directory with these files.
    fn directory(files: &[(&str, &str)]) -> TempDir {
        let directory = tempdir().unwrap();
        for (name, value) in files {
            fs::write(directory.path().join(name), value).unwrap();
        }
        directory
    }

    /// The error of reading `directory`, with the path of the directory replaced.
    fn error(directory: &Path) -> String {
        let error = read(directory).unwrap_err().to_string();
        let path = directory.to_str().unwrap();
        assert!(error.contains(path), "{error}");
        error.replace(path, "DIR")
    }

    #[test]
    fn each_spelling_of_a_key_is_accepted() {
        for user_data in ["user-data", "userdata", "userData"] {
            for network_config in ["network-config", "networkdata", "networkData"] {
                for (meta_data, vendor_data) in [("meta-data", "vendordata"), ("metadata", "vendor-data")] {
                    let directory = directory(&[
                        (user_data, "u"),
                        (network_config, "n"),
                        (meta_data, "m"),
                        (vendor_data, "v"),
                    ]);
                    let expected = Keys {
                        user_data: b"u".to_vec(),
                        meta_data: Some(b"m".to_vec()),
                        vendor_data: Some(b"v".to_vec()),
                        network_config: Some(b"n".to_vec()),
                    };
                    assert_eq!(read(directory.path()).unwrap(), expected);
                }
            }
        }
    }

    #[test]
    fn user_data_alone_is_enough_and_may_be_empty() {
        let directory = directory(&[("user-data", "")]);
        let expected = Keys {
            user_data: Vec::new(),
            meta_data: None,
            vendor_data: None,
            network_config: None,
        };
        assert_eq!(read(directory.path()).unwrap(), expected);
    }

    #[test]
    fn keys_of_a_mounted_secret_are_read_through_its_links() {
        let directory = tempdir().unwrap();
        publish(
            directory.path(),
            "..2026_01",
            &[("userdata", "old"), ("networkdata", "net")],
        );
        publish(
            directory.path(),
            "..2026_02",
            &[("userdata", "new"), ("networkdata", "net")],
        );
        let keys = read(directory.path()).unwrap();
        assert_eq!(keys.user_data, b"new");
        assert_eq!(keys.network_config.as_deref(), Some(&b"net"[..]));
    }

    #[test]
    fn keys_that_are_replaced_meanwhile_are_read_again() {
        let directory = tempdir().unwrap();
        let path = directory.path();
        publish(path, "..1", &[("user-data", "old"), ("meta-data", "old")]);
        let opened = File::open(path).unwrap();
        let reads = Cell::new(0);
        let keys = read_one_version(
            || fs::read_link(path.join("..data")).unwrap(),
            || {
                let keys = read_all(path, opened.as_fd());
                reads.set(reads.get() + 1);
                if reads.get() == 1 {
                    publish(path, "..2", &[("user-data", "new"), ("meta-data", "new")]);
                }
                keys
            },
        );
        let keys = keys.unwrap().unwrap();
        assert_eq!(reads.get(), 2);
        assert_eq!(
            (&keys.user_data[..], keys.meta_data.as_deref()),
            (&b"new"[..], Some(&b"new"[..]))
        );
    }

    #[test]
    fn keys_that_change_during_each_attempt_are_not_read() {
        let version = Cell::new(0);
        let result = read_one_version(|| version.get(), || version.set(version.get() + 1));
        assert_eq!(result, None);
        assert_eq!(version.get(), MAX_ATTEMPTS);
    }

    #[test]
    fn error_names_directory_and_key() {
        for (files, expected) in [
            (
                &[("user-data", ""), ("user-date", "")][..],
                "DIR: unknown key \"user-date\": a seed has only the keys user-data, meta-data, vendor-data and \
                 network-config",
            ),
            // The first one in the order of names, whatever the order of the directory.
            (
                &[("user-data", ""), ("c", ""), ("b\n\u{1b}[2J", ""), ("d", "")],
                "DIR: unknown key \"b\\n\\u{1b}[2J\": a seed has only",
            ),
            (
                &[("user-data", ""), (".hidden", "")],
                "DIR: unknown key \".hidden\": a seed has only",
            ),
            (
                &[("user-data", ""), ("userData", "")],
                "DIR: the keys \"user-data\" and \"userData\" mean the same: remove one",
            ),
            (
                &[("meta-data", ""), ("..user-data", "")],
                "DIR: no user data: add the key user-data to the Secret or ConfigMap (its value may be empty)",
            ),
            (&[], "DIR: no user data: add the key user-data"),
        ] {
            let directory = directory(files);
            let error = error(directory.path());
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn name_that_is_not_unicode_is_an_unknown_key() {
        let directory = directory(&[("user-data", "")]);
        fs::write(directory.path().join(std::ffi::OsStr::from_bytes(b"\xff")), "").unwrap();
        assert!(error(directory.path()).starts_with("DIR: unknown key \"\u{fffd}\""));
    }

    #[test]
    fn directory_that_cannot_be_read_is_an_error() {
        let directory = directory(&[("user-data", "")]);
        for (name, reason) in [
            ("missing", "No such file or directory"),
            ("user-data", "Not a directory"),
        ] {
            let path = directory.path().join(name);
            let expected = format!("cannot read the directory DIR: {reason} ");
            assert!(error(&path).starts_with(&expected), "{}", error(&path));
        }
    }

    #[test]
    fn only_regular_files_are_keys() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("user-data");
        let make_device = |kind| mknod(&path, kind, FileMode::S_IRWXU, makedev(1, 3));
        for kind in ["a directory", "a fifo", "a device node", "a socket"] {
            match kind {
                "a directory" => fs::create_dir(&path).unwrap(),
                // A fifo without a writer: opening it in blocking mode waits for one.
                "a fifo" => make_device(SFlag::S_IFIFO).unwrap(),
                "a device node" => make_device(SFlag::S_IFCHR).unwrap(),
                _ => drop(UnixListener::bind(&path).unwrap()),
            }
            let expected = format!("the key \"user-data\" in DIR is {kind}: it must be a regular file");
            assert_eq!(error(directory.path()), expected);
            if kind == "a directory" {
                fs::remove_dir(&path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
        }
    }

    #[test]
    fn links_do_not_leave_the_directory_cve_2026_9804() {
        let outside = directory(&[("secret", "outside")]);
        let secret = outside.path().join("secret");
        let climbing = Path::new("../../../../../../../../..").join(secret.strip_prefix("/").unwrap());
        for target in [
            secret.clone(),
            climbing,
            PathBuf::from("/proc/self/environ"),
            PathBuf::from("/dev/null"),
            PathBuf::from("user-data"),
        ] {
            let directory = tempdir().unwrap();
            symlink(&target, directory.path().join("user-data")).unwrap();
            let error = error(directory.path());
            assert!(
                error.starts_with("cannot open the key \"user-data\" in DIR: "),
                "{target:?}: {error}"
            );
            assert!(
                error.ends_with(" (symbolic links are resolved inside of the directory only)"),
                "{error}"
            );
        }
    }

    #[test]
    fn absolute_link_is_resolved_in_the_directory() {
        let directory = tempdir().unwrap();
        fs::create_dir(directory.path().join("..etc")).unwrap();
        fs::write(directory.path().join("..etc/passwd"), "inside").unwrap();
        symlink("/..etc/passwd", directory.path().join("user-data")).unwrap();
        assert_eq!(read(directory.path()).unwrap().user_data, b"inside");
    }

    #[test]
    fn key_has_at_most_the_size_of_a_secret() {
        let directory = directory(&[("user-data", "")]);
        let file = File::options()
            .write(true)
            .open(directory.path().join("user-data"))
            .unwrap();
        file.set_len(MAX_KEY_SIZE).unwrap();
        assert_eq!(read(directory.path()).unwrap().user_data, vec![0; 1 << 20]);
        // The last one does not fit into memory.
        for size in [MAX_KEY_SIZE + 1, 1 << 40] {
            file.set_len(size).unwrap();
            let expected =
                "the key \"user-data\" in DIR is larger than 1024 KiB, the size limit of a Secret and of a ConfigMap";
            assert_eq!(error(directory.path()), expected);
        }
    }

    #[test]
    fn directory_with_thousands_of_names_is_not_listed_completely() {
        let expected = "DIR: more than 64 names: a seed has only the keys user-data, meta-data";
        for prefix in ["key", "..version"] {
            let directory = directory(&[("user-data", "")]);
            for number in 0..5000 {
                File::create(directory.path().join(format!("{prefix}{number}"))).unwrap();
            }
            assert!(error(directory.path()).starts_with(expected));
        }
        let directory = directory(&[("user-data", "u")]);
        for number in 0..MAX_NAMES - 1 {
            File::create(directory.path().join(format!("..{number}"))).unwrap();
        }
        assert_eq!(read(directory.path()).unwrap().user_data, b"u");
    }
}
