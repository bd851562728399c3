//! The files of a root file system on a disk: opens them, and creates a writable one that does not exist yet.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use nutshell_disk_image::{SECTOR_SIZE, io::file_size};
use nutshell_linux::hook::{memory_file, output};
use nutshell_protocol::{DiskPart, Layer, LayeredRoot, Rootfs};

use super::error::PodError;
use crate::{
    control::MAX_DESCRIPTORS,
    oci::{MAX_ROOT_FILES, NewDiskFile, RootDisk, RootLayer},
    shim::{
        blocking::{self, FILE_SYSTEM_LIMIT},
        child::{Child, WaitStatus},
        descriptor_limit,
        machine::{BootError, JoinedDiskFile, PlainDisk, open_disk},
    },
};

/// The name in errors of the step that opens the disk of a root file system.
const OPEN_DISK: &str = "open the disk of the root file system";

/// The descriptors of a boot command besides those of disks: KVM, kernel, initramfs, the agent's stream, and the socket
/// of the file server.
const OTHER_BOOT_DESCRIPTORS: usize = 5;

const _: () = assert!(MAX_ROOT_FILES + OTHER_BOOT_DESCRIPTORS <= MAX_DESCRIPTORS);

/// The file systems on the disk of a root file system.
#[derive(Debug)]
pub(crate) enum DiskContents {
    /// One, which fills the disk.
    FileSystem { filesystem: String, options: Vec<String> },
    /// Several, each in a part of the disk.
    Layers {
        parts: Vec<DiskPart>,
        layers: Vec<Layer>,
        root: LayeredRoot,
    },
}

impl DiskContents {
    /// What the guest mounts if the disk is in disk slot `slot`.
    pub(super) fn into_rootfs(self, slot: u32) -> Rootfs {
        match self {
            Self::FileSystem { filesystem, options } => Rootfs::Disk {
                slot,
                filesystem,
                options,
            },
            Self::Layers { parts, layers, root } => Rootfs::Layers {
                slot,
                parts,
                layers,
                root,
            },
        }
    }
}

/// Opens the files of `root`, after it has created those that are new.
///
/// # Errors
///
/// A file cannot be opened or created, or its file system hangs.
pub(super) async fn open(root: RootDisk) -> Result<(PlainDisk, DiskContents), PodError> {
    match root {
        RootDisk::FileSystem {
            source,
            filesystem,
            options,
            read_only,
        } => {
            let disk = blocking::run(OPEN_DISK, move || open_disk(source, read_only)).await??;
            Ok((PlainDisk::File(disk), DiskContents::FileSystem { filesystem, options }))
        }
        RootDisk::Layers { layers, root } => {
            for layer in &layers {
                if let Some(new) = &layer.new_file {
                    create(&layer.source, &layer.filesystem, new).await?;
                }
            }
            Ok(blocking::run(OPEN_DISK, move || open_layers(layers, root)).await??)
        }
    }
}

/// Opens the files of layers as one disk. Blocks on their file systems.
fn open_layers(layers: Vec<RootLayer>, root: LayeredRoot) -> Result<(PlainDisk, DiskContents), BootError> {
    let (mut files, mut parts) = (Vec::new(), Vec::new());
    let mut start = 0;
    let mut add = |path: PathBuf, read_only| {
        let joined = open_part(path, read_only)?;
        let length = joined.length;
        parts.push(DiskPart { start, length });
        start += length;
        files.push(joined);
        Ok::<_, BootError>(u32::try_from(parts.len() - 1).unwrap_or(u32::MAX))
    };
    let mut guest_layers = Vec::new();
    for layer in layers {
        let part = add(layer.source, layer.read_only)?;
        let devices = layer.devices.into_iter().map(|device| add(device, true));
        guest_layers.push(Layer {
            part,
            devices: devices.collect::<Result<_, _>>()?,
            filesystem: layer.filesystem,
            options: layer.options,
        });
    }
    let contents = DiskContents::Layers {
        parts,
        layers: guest_layers,
        root,
    };
    Ok((PlainDisk::Joined(files), contents))
}

/// Opens a file or block device as one part of a joined disk. The part ends with the last whole sector; bytes after it
/// are left out.
fn open_part(path: PathBuf, read_only: bool) -> Result<JoinedDiskFile, BootError> {
    let file = open_disk(path, read_only)?;
    let size = file_size(&file.file).and_then(|size| match size / SECTOR_SIZE * SECTOR_SIZE {
        0 => Err(io::Error::other("it is smaller than a sector")),
        length => Ok(length),
    });
    match size {
        Ok(length) => Ok(JoinedDiskFile { file, length }),
        Err(source) => Err(BootError::Disk {
            path: file.path,
            source,
        }),
    }
}

/// Creates an image file with an empty file system, as containerd does (`core/mount/manager/mkfs.go`): sparse, and with
/// the host's `mkfs`. A file that exists is kept.
async fn create(path: &Path, filesystem: &str, new: &NewDiskFile) -> Result<(), PodError> {
    let failed = |reason: String| PodError::NewDisk {
        path: path.to_owned(),
        reason,
    };
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    // Made under another name and renamed at the end. So a file with the final name always has a complete file system,
    // even if this process is killed meanwhile.
    let unfinished = PathBuf::from(name);
    let (final_path, unfinished_path, size) = (path.to_owned(), unfinished.clone(), new.size);
    // True if the file was created, false if the disk exists already.
    let creation = blocking::run("create the disk of the root file system", move || {
        match final_path.try_exists() {
            Ok(false) => create_sparse(&unfinished_path, size).map(|()| true),
            other => other.map(|_| false),
        }
    });
    if !creation.await?.map_err(|error| failed(error.to_string()))? {
        return Ok(());
    }
    if let Err(reason) = make_file_system(&unfinished, filesystem, new).await {
        // Not awaited: its file system may hang. The next attempt, or the removal of the snapshot, removes what stays.
        drop(tokio::task::spawn_blocking(move || std::fs::remove_file(unfinished)));
        return Err(failed(reason));
    }
    let final_path = path.to_owned();
    let moved = blocking::run("rename the disk of the root file system", move || {
        std::fs::rename(unfinished, final_path)
    });
    moved.await?.map_err(|error| failed(error.to_string()))
}

/// Creates a file of `size` zeroes, which uses no space. Replaces an unfinished one.
fn create_sparse(path: &Path, size: u64) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file: File = OpenOptions::new().write(true).create_new(true).mode(0o640).open(path)?;
    file.set_len(size)
}

/// The path of `name` in /usr/sbin or /sbin, which the `PATH` may lack if containerd was not started by an init system.
/// If `name` is in neither, only `name`, for a look-up in the `PATH`.
fn find_program(name: &str) -> PathBuf {
    let paths = ["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).join(name));
    let found = paths.into_iter().find(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from(name))
}

/// Runs `mkfs` on the file `path`. If the program fails, the error has what it wrote to its standard error.
async fn make_file_system(path: &Path, filesystem: &str, new: &NewDiskFile) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let program = format!("mkfs.{filesystem}");
    let stderr = memory_file("").map_err(text)?;
    let (stdin, stdout) = (memory_file("").map_err(text)?, memory_file("").map_err(text)?);
    let (name, path, uuid) = (program.clone(), path.to_owned(), new.uuid);
    let child_stderr = stderr.try_clone().map_err(text)?;
    let spawn = move || {
        let mut command = Command::new(find_program(&name));
        command
            .args(["-q", "-F"])
            .stdin(stdin)
            .stdout(stdout)
            .stderr(child_stderr);
        if let Some(uuid) = uuid {
            command.arg("-U").arg(uuid.to_string());
        }
        command.arg("--").arg(path);
        descriptor_limit::restore_for(&mut command);
        command.spawn().and_then(|child| Child::from_std(&child))
    };
    let child = blocking::run("start mkfs", spawn)
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| format!("cannot run {program}: {error}. Install the package e2fsprogs on this host"))?;
    // Dropping the child kills it.
    let ended = match tokio::time::timeout(FILE_SYSTEM_LIMIT, child.reap()).await {
        Ok(ended) => ended.map_err(text)?,
        Err(_) => {
            return Err(format!(
                "{program} did not end within {} s",
                FILE_SYSTEM_LIMIT.as_secs()
            ));
        }
    };
    match ended {
        WaitStatus::Exited(0) => Ok(()),
        status => {
            let reason = output(stderr).map_err(text)?;
            Err(format!("{program} {status}: {}", reason.trim()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn layer(source: &Path, new_file: Option<NewDiskFile>) -> RootLayer {
        RootLayer {
            source: source.to_owned(),
            devices: Vec::new(),
            filesystem: "ext4".to_owned(),
            options: Vec::new(),
            read_only: new_file.is_none(),
            new_file,
        }
    }

    fn root() -> LayeredRoot {
        LayeredRoot {
            directories: Vec::new(),
            mount: nutshell_protocol::RootMount::Overlay {
                lower: Vec::new(),
                upper: None,
                options: Vec::new(),
            },
        }
    }

    fn new_file(size: u64) -> NewDiskFile {
        NewDiskFile {
            size,
            uuid: Some(uuid::Uuid::from_u128(0x1234)),
        }
    }

    #[tokio::test]
    async fn files_become_consecutive_parts_of_whole_sectors() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, size: u64| {
            let path = directory.path().join(name);
            File::create(&path).unwrap().set_len(size).unwrap();
            path
        };
        let mut merged = layer(&file("fsmeta", 4096), None);
        merged.devices = vec![file("1", 1536), file("2", 1000)];
        let layers = vec![merged, layer(&file("3", 512), None)];

        let (disk, contents) = open(RootDisk::Layers { layers, root: root() }).await.unwrap();

        let PlainDisk::Joined(files) = disk else {
            panic!("{disk:?}")
        };
        let lengths: Vec<_> = files.iter().map(|file| file.length).collect();
        assert_eq!(lengths, [4096, 1536, 512, 512]);
        let Rootfs::Layers {
            slot: 3, parts, layers, ..
        } = contents.into_rootfs(3)
        else {
            panic!("not layers");
        };
        let starts: Vec<_> = parts.iter().map(|part| part.start).collect();
        assert_eq!(starts, [0, 4096, 5632, 6144]);
        assert_eq!((layers[0].part, &layers[0].devices[..]), (0, &[1, 2][..]));
        assert_eq!((layers[1].part, &layers[1].devices[..]), (3, &[][..]));
    }

    #[tokio::test]
    async fn new_file_gets_a_file_system_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rwlayer.img");
        let layers = || vec![layer(&path, Some(new_file(8 << 20)))];

        open(RootDisk::Layers {
            layers: layers(),
            root: root(),
        })
        .await
        .unwrap();

        let superblock = std::fs::read(&path).unwrap();
        assert_eq!(superblock.len(), 8 << 20);
        assert_eq!(superblock[1024 + 0x38..1024 + 0x3a], [0x53, 0xef]);
        assert_eq!(superblock[1024 + 0x68..1024 + 0x78], 0x1234_u128.to_be_bytes());
        std::fs::write(&path, [7; 1024]).unwrap();
        open(RootDisk::Layers {
            layers: layers(),
            root: root(),
        })
        .await
        .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [7; 1024]);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// The file is removed in the background.
    async fn wait_until_empty(directory: &Path) {
        let deadline = Instant::now() + FILE_SYSTEM_LIMIT;
        while std::fs::read_dir(directory).unwrap().count() > 0 {
            assert!(Instant::now() < deadline, "the file stays");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn failed_creation_leaves_no_file_and_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rwlayer.img");

        let error = create(&path, "ext4", &new_file(4096)).await.unwrap_err().to_string();

        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("mkfs.ext4 exited with status "), "{error}");
        wait_until_empty(directory.path()).await;
        let error = create(&path, "none", &new_file(4096)).await.unwrap_err().to_string();
        assert!(error.contains("cannot run mkfs.none"), "{error}");
        wait_until_empty(directory.path()).await;
    }

    #[tokio::test]
    async fn file_smaller_than_a_sector_is_refused_with_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer.erofs");
        std::fs::write(&path, [0; 511]).unwrap();
        let layers = vec![layer(&path, None)];

        let error = open(RootDisk::Layers { layers, root: root() }).await.unwrap_err();

        let expected = format!("cannot open the disk {}: it is smaller than a sector", path.display());
        assert_eq!(error.to_string(), expected);
    }
}
