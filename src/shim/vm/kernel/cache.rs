//! A cache of the kernels in images: the next virtual machine from the same image boots without a disk reader.
//!
//! An entry belongs to one disk file in the read-only layers of an image. It is not used for a disk that its guest has
//! written to: a restarted container and a reboot always read the disk. The files in an entry come from the guest of
//! the disk reader, and are as untrusted as when it sent them.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nutshell_protocol::{MAX_DISK_INITRD, MAX_DISK_KERNEL};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BootFiles, MAX_SOURCE, check_command_line};
use crate::{
    oci::{HostFiles, VmImage},
    shim::machine::{DiskImage, printable_line},
};

/// The directory of the cache. Entries are not needed after an update of nutshell, whose version is in their keys.
const DIRECTORY: &str = "/var/cache/nutshell/kernels";

const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const DESCRIPTION: &str = "description.json";

/// The prefix of an entry that is being written.
const INCOMPLETE: &str = ".incomplete-";

/// An incomplete entry of this age has no writer: its shim was killed.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);

/// A disk that was changed more recently than this may change again without a change of its time stamps: the kernel's
/// clock for them has a resolution of up to 10 ms (`CONFIG_HZ`).
const MIN_AGE: Duration = Duration::from_millis(50);

/// [`MIN_AGE`] on a file system that stores seconds only.
const MIN_AGE_IN_SECONDS: Duration = Duration::from_secs(2);

/// The longest description that is read, in bytes.
const MAX_DESCRIPTION: u64 = 64 << 10;

/// The kernels of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KernelCache {
    directory: PathBuf,
    /// The maximum size of all entries, in bytes.
    max_bytes: u64,
}

/// The place of one disk's kernel in the cache.
#[derive(Debug, Clone)]
pub(crate) struct CacheEntry {
    cache: KernelCache,
    /// The name of its directory.
    key: String,
}

/// What an entry has in addition to the files of [`BootFiles`].
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    command_line: String,
    source: String,
    kernel_size: u64,
    initrd_size: Option<u64>,
}

/// The text of an error, which begins with the action that failed.
type CacheError = String;

fn failed(action: &str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let context = format!("{action} {}", path.display());
    move |error| format!("{context}: {error}")
}

impl KernelCache {
    /// The cache of this host with at most `max_bytes` bytes. `None` if that is 0.
    pub(crate) fn of_host(max_bytes: u64) -> Option<Self> {
        (max_bytes > 0).then(|| Self {
            directory: PathBuf::from(DIRECTORY),
            max_bytes,
        })
    }

    /// The entry of `disk`, which is in the root file system `image`. `None` if its kernel must be read from the disk:
    /// the guest has written to the disk, or the disk is not in a layer that all containers of the image share, or it
    /// was changed less than [`MIN_AGE`] ago. Reads the status of two files, and blocks on their file systems.
    pub(crate) fn entry(&self, image: &VmImage, disk: &DiskImage) -> Option<CacheEntry> {
        self.entry_at(image, disk, SystemTime::now())
    }

    fn entry_at(&self, image: &VmImage, disk: &DiskImage, now: SystemTime) -> Option<CacheEntry> {
        let layers = shared_layers(&image.0)?;
        let (base, writes) = (disk.base.metadata().ok()?, disk.writes.metadata().ok()?);
        if writes.len() > 0 {
            return None;
        }
        let (seconds, nanoseconds) = (base.ctime().try_into().ok()?, base.ctime_nsec().try_into().ok()?);
        let changed = SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))?;
        let min_age = if nanoseconds == 0 { MIN_AGE_IN_SECONDS } else { MIN_AGE };
        if now.duration_since(changed).unwrap_or_default() < min_age {
            return None;
        }
        let mut hash = Sha256::new();
        for text in [
            env!("CARGO_PKG_VERSION"),
            layers,
            &disk.path.to_string_lossy(),
            &format!("{:?}", disk.format),
        ] {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        }
        // The device is left out: overlayfs has another one for each mount.
        for number in [base.mtime(), base.mtime_nsec(), base.ctime(), base.ctime_nsec()] {
            hash.update(number.to_le_bytes());
        }
        hash.update(base.ino().to_le_bytes());
        hash.update(base.len().to_le_bytes());
        let key = hash.finalize().iter().fold(String::new(), |mut key, byte| {
            // Cannot fail for a string.
            let _ = write!(key, "{byte:02x}");
            key
        });
        Some(CacheEntry {
            cache: self.clone(),
            key,
        })
    }

    /// Removes the entries that were not used for the longest time, until `needed` more bytes fit, and entries whose
    /// writer was killed.
    fn make_room(&self, needed: u64) -> Result<(), CacheError> {
        let listed = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        let mut entries = Vec::new();
        for entry in listed {
            let path = entry.map_err(failed("list", &self.directory))?.path();
            // Another shim may have removed it.
            let Ok((used, bytes)) = last_use_and_size(&path) else {
                continue;
            };
            let is_incomplete = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(INCOMPLETE));
            if !is_incomplete {
                entries.push((used, bytes, path));
            } else if used.elapsed().is_ok_and(|age| age > ABANDONED_AFTER) {
                remove(&path)?;
            }
        }
        entries.sort();
        let mut total: u64 = entries.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in entries {
            if total.saturating_add(needed) <= self.max_bytes {
                break;
            }
            remove(&path)?;
            total -= bytes;
        }
        Ok(())
    }
}

impl CacheEntry {
    /// Opens the kernel. `None` if the cache has none. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// The entry is damaged. It is then removed.
    pub(in crate::shim::vm) fn load(&self) -> Result<Option<BootFiles>, CacheError> {
        let directory = self.cache.directory.join(&self.key);
        let loaded = self.try_load(&directory);
        match &loaded {
            // For `make_room`. Without it, the entry only seems older than it is.
            Ok(Some(_)) => drop(File::open(&directory).and_then(|opened| opened.set_modified(SystemTime::now()))),
            Ok(None) => {}
            Err(_) => remove(&directory)?,
        }
        loaded
    }

    fn try_load(&self, directory: &Path) -> Result<Option<BootFiles>, CacheError> {
        let path = directory.join(DESCRIPTION);
        let description = match open_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed("open", &path))?,
        };
        let limited = io::Read::take(&description, MAX_DESCRIPTION);
        let description: Description =
            serde_json::from_reader(limited).map_err(|error| format!("read {}: {error}", path.display()))?;
        let open = |name: &str, expected: u64, max: u64| {
            let path = directory.join(name);
            let file = open_file(&path).map_err(failed("open", &path))?;
            let size = file.metadata().map_err(failed("read the size of", &path))?.len();
            match size == expected && size > 0 && size <= max {
                true => Ok(file.into()),
                false => Err(format!("{} has {size} bytes instead of {expected}", path.display())),
            }
        };
        Ok(Some(BootFiles {
            kernel: open(KERNEL, description.kernel_size, MAX_DISK_KERNEL)?,
            initramfs: description
                .initrd_size
                .map(|size| open(INITRD, size, MAX_DISK_INITRD))
                .transpose()?,
            command_line: check_command_line(description.command_line).map_err(|error| error.to_string())?,
            source: printable_line(&description.source, MAX_SOURCE),
        }))
    }

    /// Stores the kernel, unless it is larger than the cache. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// The errors of the file system. Nothing is left of the entry then.
    pub(in crate::shim::vm) fn store(&self, files: &BootFiles) -> Result<(), CacheError> {
        let size = |file: &File| file.metadata().map(|metadata| metadata.len());
        let read_size = |error| format!("read the size of the kernel: {error}");
        let description = Description {
            command_line: files.command_line.clone(),
            source: files.source.clone(),
            kernel_size: size(&files.kernel).map_err(read_size)?,
            initrd_size: files.initramfs.as_deref().map(size).transpose().map_err(read_size)?,
        };
        let needed = description
            .kernel_size
            .saturating_add(description.initrd_size.unwrap_or_default());
        if needed > self.cache.max_bytes {
            return Ok(());
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.cache.directory)
            .map_err(failed("create", &self.cache.directory))?;
        self.cache.make_room(needed)?;
        let incomplete = self.cache.directory.join(unique_incomplete_name()?);
        let entry = self.cache.directory.join(&self.key);
        let stored = write_entry(&incomplete, files, &description).and_then(|()| {
            match fs::rename(&incomplete, &entry) {
                // Another shim has stored the same.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => remove(&incomplete),
                renamed => renamed.map_err(failed("rename", &incomplete)),
            }
        });
        if stored.is_err() {
            // The first error counts.
            let _ = remove(&incomplete);
        }
        stored
    }
}

/// The name of a new entry, which no other writer uses: pids are not unique among the pid namespaces of a host, and one
/// shim can store the same kernel twice at a time.
fn unique_incomplete_name() -> Result<String, CacheError> {
    let mut random = [0; 16];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(|error| format!("choose a file name: {error}"))?;
    Ok(format!("{INCOMPLETE}{:032x}", u128::from_ne_bytes(random)))
}

/// The paths of an image's layers, which identify them. `None` if its root file system is not an overlay on layers that
/// containers share.
fn shared_layers(files: &HostFiles) -> Option<&str> {
    let HostFiles::Mounts(mounts) = files else {
        return None;
    };
    match &mounts[..] {
        [mount] if mount.kind == "overlay" => mount.options.iter().find_map(|option| option.strip_prefix("lowerdir=")),
        _ => None,
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Writes the files of an entry to the new directory `directory`, and waits until they are on the disk.
fn write_entry(directory: &Path, files: &BootFiles, description: &Description) -> Result<(), CacheError> {
    DirBuilder::new()
        .mode(0o700)
        .create(directory)
        .map_err(failed("create", directory))?;
    let create = |name: &str| {
        let path = directory.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("create", &path))
    };
    let copy = |name: &str, from: &File, size: u64| {
        let to = create(name)?;
        let mut offset = 0;
        let mut left = usize::try_from(size).unwrap_or(usize::MAX);
        while left > 0 {
            // The file position is shared with the machine that boots, so it must not move.
            match rustix::fs::sendfile(&to, from, Some(&mut offset), left) {
                Ok(0) => break,
                Ok(copied) => left -= copied,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed("write", &directory.join(name))(error.into())),
            }
        }
        to.sync_data().map_err(failed("write", &directory.join(name)))
    };
    copy(KERNEL, &files.kernel, description.kernel_size)?;
    if let (Some(initrd), Some(size)) = (&files.initramfs, description.initrd_size) {
        copy(INITRD, initrd, size)?;
    }
    let file = create(DESCRIPTION)?;
    serde_json::to_writer(&file, description).map_err(|error| format!("write the description: {error}"))?;
    file.sync_data().map_err(failed("write", &directory.join(DESCRIPTION)))
}

/// When an entry was last used, and its size in bytes.
fn last_use_and_size(entry: &Path) -> io::Result<(SystemTime, u64)> {
    let used = fs::symlink_metadata(entry)?.modified()?;
    let mut bytes = 0;
    for file in fs::read_dir(entry)? {
        bytes += file?.metadata()?.len();
    }
    Ok((used, bytes))
}

/// Removes an entry. Another shim may have removed it.
fn remove(entry: &Path) -> Result<(), CacheError> {
    match fs::remove_dir_all(entry) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("remove", entry)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::control::BaseFormat;
    use crate::oci::HostMount;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn boot_files(kernel: &[u8], initramfs: Option<&[u8]>) -> BootFiles {
        BootFiles {
            kernel: file(kernel).into(),
            initramfs: initramfs.map(|initramfs| file(initramfs).into()),
            command_line: "root=/dev/vda1".to_owned(),
            source: "/boot/grub/grub.cfg".to_owned(),
        }
    }

    fn cache(directory: &tempfile::TempDir, max_bytes: u64) -> KernelCache {
        KernelCache {
            directory: directory.path().join("kernels"),
            max_bytes,
        }
    }

    fn entry(cache: &KernelCache, key: &str) -> CacheEntry {
        CacheEntry {
            cache: cache.clone(),
            key: key.to_owned(),
        }
    }

    fn read(file: &mut File) -> Vec<u8> {
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        content
    }

    #[test]
    fn kernel_is_stored_beside_the_incomplete_entry_of_a_writer_with_the_same_pid() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(&directory, 1 << 20);
        let other = cache.directory.join(format!("{INCOMPLETE}{}-a", std::process::id()));
        fs::create_dir_all(&other).unwrap();

        entry(&cache, "a").store(&boot_files(b"kernel", None)).unwrap();

        assert!(entry(&cache, "a").load().unwrap().is_some());
        assert!(other.exists());
    }

    #[test]
    fn stored_kernel_is_loaded_with_its_initrd_and_command_line() {
        let directory = tempfile::tempdir().unwrap();
        let entry = entry(&cache(&directory, 1 << 20), "a");
        assert!(entry.load().unwrap().is_none());

        let stored = boot_files(b"kernel", Some(b"initrd"));
        entry.store(&stored).unwrap();
        // As another shim does at the same time.
        entry.store(&stored).unwrap();
        let mut loaded = entry.load().unwrap().unwrap();

        assert_eq!(read(&mut loaded.kernel), b"kernel");
        assert_eq!(read(&mut loaded.initramfs.unwrap()), b"initrd");
        assert_eq!(loaded.command_line, "root=/dev/vda1");
        assert_eq!(loaded.source, "/boot/grub/grub.cfg");
        assert_eq!(
            fs::read_dir(&entry.cache.directory).unwrap().count(),
            1,
            "nothing else is left"
        );
    }

    #[test]
    fn damaged_entry_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let entry = entry(&cache(&directory, 1 << 20), "a");
        let path = entry.cache.directory.join("a");
        type Damage = fn(&Path) -> io::Result<()>;
        let damages: [Damage; 4] = [
            |path| File::options().write(true).open(path.join(KERNEL))?.set_len(3),
            |path| fs::remove_file(path.join(INITRD)),
            |path| fs::write(path.join(DESCRIPTION), "{"),
            |path| {
                let text = fs::read_to_string(path.join(DESCRIPTION))?;
                fs::write(path.join(DESCRIPTION), text.replace("root=", "a\\nb="))
            },
        ];
        for damage in damages {
            entry.store(&boot_files(b"kernel", Some(b"initrd"))).unwrap();
            damage(&path).unwrap();

            let error = entry.load().unwrap_err();

            assert!(!error.is_empty());
            assert!(!path.exists(), "{error}");
        }
    }

    #[test]
    fn entries_that_were_not_used_longest_make_room_for_new_ones() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(&directory, 2500);
        let kernel = [0_u8; 1000];
        let exists = |key| cache.directory.join(key).exists();
        for key in ["a", "b"] {
            entry(&cache, key).store(&boot_files(&kernel, None)).unwrap();
        }
        // "a" is used after "b".
        let long_ago = SystemTime::now() - Duration::from_secs(60);
        let opened = File::open(cache.directory.join("b")).unwrap();
        opened.set_modified(long_ago).unwrap();
        entry(&cache, "a").load().unwrap().unwrap();
        let abandoned = cache.directory.join(format!("{INCOMPLETE}1-x"));
        fs::create_dir(&abandoned).unwrap();
        let opened = File::open(&abandoned).unwrap();
        opened.set_modified(long_ago - ABANDONED_AFTER).unwrap();

        entry(&cache, "c").store(&boot_files(&kernel, None)).unwrap();
        entry(&cache, "too-large").store(&boot_files(&[0; 2501], None)).unwrap();

        assert_eq!(["a", "b", "c", "too-large"].map(exists), [true, false, true, false]);
        assert!(!abandoned.exists());
    }

    #[test]
    fn entry_exists_for_unwritten_disks_in_shared_layers_only() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(&directory, 1 << 20);
        let image = |kind: &str, options: &[&str]| {
            let mount = HostMount {
                kind: kind.to_owned(),
                source: String::new(),
                target: String::new(),
                options: options.iter().map(|option| (*option).to_owned()).collect(),
            };
            VmImage(HostFiles::Mounts(vec![mount]))
        };
        let base = file(b"disk");
        let disk = |base: &File, writes: &[u8]| DiskImage {
            format: BaseFormat::Detected,
            path: "/disk/disk.raw".into(),
            base: base.try_clone().unwrap().into(),
            writes: file(writes).into(),
            host_boot: [0; 16],
        };
        let overlay = image("overlay", &["upperdir=/u", "lowerdir=/l"]);
        let status = base.metadata().unwrap();
        let changed = Duration::new(
            status.ctime().cast_unsigned(),
            u32::try_from(status.ctime_nsec()).unwrap(),
        );
        let soon = SystemTime::UNIX_EPOCH + changed + MIN_AGE / 5;
        let later = soon + Duration::from_secs(10);
        let key = |image: &VmImage, disk: &DiskImage| cache.entry_at(image, disk, later).map(|entry| entry.key);
        let early = cache.entry_at(&overlay, &disk(&base, b""), soon);
        assert!(early.is_none(), "it may still change");

        let first = key(&overlay, &disk(&base, b"")).unwrap();
        assert_eq!(key(&overlay, &disk(&base, b"")), Some(first.clone()));
        assert_ne!(
            key(&image("overlay", &["lowerdir=/other"]), &disk(&base, b"")),
            Some(first.clone())
        );
        assert_eq!(key(&overlay, &disk(&base, b"x")), None, "the guest has written to it");
        assert_eq!(key(&image("bind", &["rbind"]), &disk(&base, b"")), None);
        // A change gives another key, although the size is the same.
        base.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(key(&overlay, &disk(&base, b"")).unwrap(), first);
    }
}
