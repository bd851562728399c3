//! The host resources that a machine boots with. The shim opens all of them; the vmm opens none.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nutshell_protocol::{AGENT_DISK, disk_serial};

use crate::{
    control::{
        BaseFormat, BoardKind, Command, DiskAccess, DiskConfig, Extent, FileAccess, LinkConfig, MachineConfig, Software,
    },
    guest_image::{self, GuestImage, GuestImageError},
    oci::{PodSize, Size},
    shim::blocking::DropOffThread,
};

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot {step} of a virtual machine: {source}")]
    Descriptors { step: &'static str, source: io::Error },
    #[error("cannot open the disk {}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error(transparent)]
    GuestImage(#[from] GuestImageError),
    /// `/dev/kvm` cannot be opened: the cause, and a remedy if one is known.
    #[error("cannot open /dev/kvm: {0}")]
    Kvm(String),
    #[error("cannot start the vmm process of a virtual machine: {0}")]
    Spawn(#[source] io::Error),
}

/// The file or block device behind a disk.
#[derive(Debug)]
pub(crate) struct DiskFile {
    /// From [`open_disk`].
    pub(crate) file: DropOffThread<File>,
    /// Its path, for messages.
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// A raw disk.
#[derive(Debug)]
pub(crate) enum PlainDisk {
    /// A whole file or block device, which can grow.
    File(DiskFile),
    /// The first bytes of files, one after the other. Not empty.
    Joined(Vec<JoinedDiskFile>),
}

/// A file of a disk that consists of several.
#[derive(Debug)]
pub(crate) struct JoinedDiskFile {
    pub(crate) file: DiskFile,
    /// How many bytes of the file belong to the disk: a multiple of 512, and not 0.
    pub(crate) length: u64,
}

/// The resources that are the same for every machine of this host.
#[derive(Debug)]
pub(crate) struct GuestResources {
    /// `/dev/kvm`.
    pub(crate) kvm: OwnedFd,
    pub(crate) image: GuestImage,
    /// Appended to the kernel's command line.
    pub(crate) kernel_arguments: String,
    /// The board that the kernel boots on.
    pub(crate) board: BoardKind,
}

/// A disk that a machine boots with.
#[derive(Debug)]
pub(crate) enum BootDisk {
    /// A raw disk.
    Plain(PlainDisk),
    /// A disk whose writes go to a copy-on-write file.
    CopyOnWrite {
        image: Arc<DiskImage>,
        /// The guest can only read.
        read_only: bool,
    },
    /// The program of the agent ([`open_agent_disk`]).
    Agent { file: File, extent: Extent },
}

/// A base image, and the copy-on-write file that belongs to it.
#[derive(Debug)]
pub(crate) struct DiskImage {
    pub(crate) format: BaseFormat,
    /// The path of the base image in its root file system, for messages.
    pub(crate) path: PathBuf,
    /// Open for reading.
    pub(crate) base: DropOffThread<File>,
    /// Open for reading and writing.
    pub(crate) writes: DropOffThread<File>,
    /// The host's boot ID (see [`DiskAccess::CopyOnWrite`]).
    pub(crate) host_boot: [u8; 16],
}

/// The machine to boot, with its resources.
#[derive(Debug)]
pub(crate) struct BootRequest {
    pub(crate) guest: GuestResources,
    pub(crate) size: PodSize,
    /// The vhost-user socket of the file server; `None` if no directories are shared.
    pub(crate) file_server: Option<OwnedFd>,
    /// The disks in the first disk slots.
    pub(crate) disks: Vec<BootDisk>,
    /// How many empty disk slots follow, for hot-plugged disks.
    pub(crate) hotplug_disks: u32,
}

impl BootRequest {
    /// The command, and its descriptors in the order that [`Command::Boot`] documents. `agent` is the guest's end of
    /// the stream on [`nutshell_protocol::AGENT_PORT`].
    ///
    /// # Errors
    ///
    /// A descriptor cannot be duplicated.
    pub(super) fn into_command(self, agent: OwnedFd) -> io::Result<(Command, DropOffThread<Vec<OwnedFd>>)> {
        let GuestResources {
            kvm,
            image,
            kernel_arguments,
            board,
        } = self.guest;
        let machine = MachineConfig {
            memory: self.size.boot.memory,
            max_memory: self.size.max.memory,
            vcpus: self.size.boot.vcpus,
            max_vcpus: self.size.max.vcpus,
            file_server: self.file_server.is_some(),
            disks: (0..)
                .zip(&self.disks)
                .map(|(slot, disk)| DiskConfig {
                    serial: disk_serial(slot),
                    access: disk.access(),
                })
                .collect(),
            hotplug_disks: self.hotplug_disks,
            kernel: image.kernel_extent,
        };
        let software = Software::Agent {
            board,
            initramfs: image.initramfs_extent,
            kernel_arguments,
        };
        let mut descriptors = DropOffThread::from(vec![kvm, image.kernel.into(), image.initramfs.into(), agent]);
        descriptors.extend(self.file_server);
        for disk in self.disks {
            descriptors.extend(disk.into_descriptors()?);
        }
        Ok((Command::Boot(machine, software), descriptors))
    }
}

/// A machine with a user's kernel ([`Software::User`]).
#[derive(Debug)]
pub(crate) struct UserBootRequest {
    /// `/dev/kvm`.
    pub(crate) kvm: OwnedFd,
    pub(crate) size: Size,
    /// The maximum memory in bytes, including that of `size`.
    pub(crate) max_memory: u64,
    /// The whole file.
    pub(crate) kernel: DropOffThread<File>,
    /// The whole file.
    pub(crate) initramfs: Option<DropOffThread<File>>,
    /// The whole command line.
    pub(crate) command_line: String,
    /// Identifies the machine, in the byte order of RFC 9562.
    pub(crate) uuid: [u8; 16],
    /// Non-blocking.
    pub(crate) console_input: Option<OwnedFd>,
    /// Non-blocking.
    pub(crate) console_output: Option<OwnedFd>,
    /// Strings for the guest's software (SMBIOS, type 11).
    pub(crate) oem_strings: Vec<String>,
    /// The socket behind [`crate::control::GUEST_AGENT_PORT`], non-blocking.
    pub(crate) guest_agent: Option<OwnedFd>,
    /// With the queues of each tap device.
    pub(crate) links: Vec<(LinkConfig, Vec<OwnedFd>)>,
    /// With their serials.
    pub(crate) disks: Vec<(String, BootDisk)>,
    /// The vhost-user socket of the file server; `None` if no directories are shared.
    pub(crate) file_server: Option<OwnedFd>,
}

impl UserBootRequest {
    /// The command, and its descriptors in the order that [`Command::Boot`] documents. Blocks on the file systems of
    /// kernel and initramfs.
    ///
    /// # Errors
    ///
    /// The size of a file cannot be read, or a descriptor cannot be duplicated.
    pub(super) fn into_command(self) -> io::Result<(Command, DropOffThread<Vec<OwnedFd>>)> {
        let whole = |file: &File| -> io::Result<Extent> {
            let length = file.metadata()?.len();
            Ok(Extent { offset: 0, length })
        };
        let machine = MachineConfig {
            memory: self.size.memory,
            max_memory: self.max_memory,
            vcpus: self.size.vcpus,
            max_vcpus: self.size.vcpus,
            file_server: self.file_server.is_some(),
            disks: self
                .disks
                .iter()
                .map(|(serial, disk)| DiskConfig {
                    serial: serial.clone(),
                    access: disk.access(),
                })
                .collect(),
            hotplug_disks: 0,
            kernel: whole(&self.kernel)?,
        };
        let (links, queues): (Vec<_>, Vec<_>) = self.links.into_iter().unzip();
        let software = Software::User {
            initramfs: self.initramfs.as_deref().map(whole).transpose()?,
            command_line: self.command_line,
            uuid: self.uuid,
            oem_strings: self.oem_strings,
            console_input: self.console_input.is_some(),
            console_output: self.console_output.is_some(),
            guest_agent: self.guest_agent.is_some(),
            links,
        };
        let mut descriptors = DropOffThread::from(vec![self.kvm, self.kernel.into_inner().into()]);
        descriptors.extend(self.initramfs.map(|initramfs| initramfs.into_inner().into()));
        descriptors.extend(self.console_input);
        descriptors.extend(self.console_output);
        descriptors.extend(self.guest_agent);
        descriptors.extend(queues.into_iter().flatten());
        descriptors.extend(self.file_server);
        for (_, disk) in self.disks {
            descriptors.extend(disk.into_descriptors()?);
        }
        Ok((Command::Boot(machine, software), descriptors))
    }
}

impl PlainDisk {
    /// The path on the host, for messages. That of the first file if there are several.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(disk) => &disk.path,
            Self::Joined(files) => files.first().map_or(Path::new(""), |joined| &joined.file.path),
        }
    }

    pub(super) fn access(&self) -> DiskAccess {
        match self {
            Self::File(disk) if disk.read_only => DiskAccess::ReadOnly,
            Self::File(_) => DiskAccess::ReadWrite,
            Self::Joined(files) => DiskAccess::Joined(
                files
                    .iter()
                    .map(|joined| FileAccess {
                        length: joined.length,
                        read_only: joined.file.read_only,
                    })
                    .collect(),
            ),
        }
    }

    /// The descriptors that [`DiskAccess`] documents.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::File(disk) => vec![disk.file.as_fd()],
            Self::Joined(files) => files.iter().map(|joined| joined.file.file.as_fd()).collect(),
        }
    }
}

impl BootDisk {
    /// The path on the host, for messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Plain(disk) => disk.path(),
            Self::CopyOnWrite { image, .. } => &image.path,
            Self::Agent { .. } => Path::new(AGENT_DISK),
        }
    }

    fn access(&self) -> DiskAccess {
        match self {
            Self::Plain(disk) => disk.access(),
            Self::CopyOnWrite { image, read_only } => DiskAccess::CopyOnWrite {
                format: image.format,
                host_boot: image.host_boot,
                read_only: *read_only,
            },
            Self::Agent { extent, .. } => DiskAccess::ReadOnlyPart(*extent),
        }
    }

    /// The descriptors that [`DiskAccess`] documents.
    fn into_descriptors(self) -> io::Result<Vec<OwnedFd>> {
        Ok(match self {
            Self::Plain(PlainDisk::File(disk)) => vec![disk.file.into_inner().into()],
            Self::Plain(PlainDisk::Joined(files)) => {
                let files = files.into_iter().map(|joined| joined.file.file.into_inner());
                files.map(OwnedFd::from).collect()
            }
            Self::Agent { file, .. } => vec![file.into()],
            Self::CopyOnWrite { image, .. } => vec![image.base.try_clone()?.into(), image.writes.try_clone()?.into()],
        })
    }
}

/// Opens `/dev/kvm`. The error names a remedy if one is known.
pub(crate) fn open_kvm() -> Result<OwnedFd, BootError> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Ok(kvm.into()),
        Err(error) => Err(BootError::Kvm(match error.kind() {
            io::ErrorKind::NotFound => "it does not exist: enable virtualization in the firmware, or nested \
                virtualization if this host is a virtual machine itself, and load the module kvm_intel or kvm_amd"
                .to_owned(),
            io::ErrorKind::PermissionDenied => {
                "permission denied: run containerd as root, or add its user to the group that owns the file".to_owned()
            }
            _ => match error.raw_os_error() {
                Some(libc::ENODEV | libc::ENXIO) => "no such device: load the module kvm_intel or kvm_amd".to_owned(),
                _ => error.to_string(),
            },
        })),
    }
}

/// Opens the disk whose bytes are the agent's program, for the guest of a user's kernel.
pub(crate) fn open_agent_disk() -> Result<BootDisk, BootError> {
    let (file, extent) = guest_image::open_agent()?;
    Ok(BootDisk::Agent { file, extent })
}

/// Opens the regular file or block device behind a disk. Any other file is an error.
pub(crate) fn open_disk(path: PathBuf, read_only: bool) -> Result<DiskFile, BootError> {
    let open = || {
        // Without O_NONBLOCK, opening a fifo would block the shim.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("neither a file nor a block device"));
        }
        let flags = rustix::fs::fcntl_getfl(file.as_fd())? - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(file.as_fd(), flags)?;
        Ok(file)
    };
    match open() {
        Ok(file) => Ok(DiskFile {
            file: file.into(),
            path,
            read_only,
        }),
        Err(source) => Err(BootError::Disk { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size {
        memory: 2 << 20,
        vcpus: 1,
    };

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    fn boot_request(file_server: Option<OwnedFd>, disks: Vec<PlainDisk>) -> BootRequest {
        let extent = Extent { offset: 0, length: 0 };
        BootRequest {
            guest: GuestResources {
                kvm: null().into(),
                image: GuestImage {
                    kernel: null(),
                    kernel_extent: extent,
                    initramfs: null(),
                    initramfs_extent: extent,
                },
                kernel_arguments: String::new(),
                board: BoardKind::Container,
            },
            size: PodSize::fixed(SIZE),
            file_server,
            disks: disks.into_iter().map(BootDisk::Plain).collect(),
            hotplug_disks: 0,
        }
    }

    #[test]
    fn boot_command_announces_the_descriptors_that_go_with_it() {
        let file = |read_only| DiskFile {
            file: null().into(),
            path: "/dev/null".into(),
            read_only,
        };
        let joined = |length, read_only| JoinedDiskFile {
            file: file(read_only),
            length,
        };
        let disks = || {
            vec![
                PlainDisk::File(file(true)),
                PlainDisk::Joined(vec![joined(512, false), joined(1024, true)]),
                PlainDisk::File(file(false)),
            ]
        };
        let access = |length, read_only| FileAccess { length, read_only };
        let joined = DiskAccess::Joined(vec![access(512, false), access(1024, true)]);
        for (file_server, count) in [(Some(null().into()), 9), (None, 8)] {
            let has_file_server = file_server.is_some();
            let (command, descriptors) = boot_request(file_server, disks()).into_command(null().into()).unwrap();
            let Command::Boot(machine, Software::Agent { .. }) = command else {
                panic!("{command:?}");
            };
            assert_eq!(machine.file_server, has_file_server);
            let accesses = machine.disks.iter().map(|disk| &disk.access);
            assert!(accesses.eq([&DiskAccess::ReadOnly, &joined, &DiskAccess::ReadWrite]));
            assert_eq!(descriptors.len(), count);
        }
    }

    #[test]
    fn boot_command_of_a_users_kernel_announces_the_descriptors_that_go_with_it() {
        let image = Arc::new(DiskImage {
            format: BaseFormat::Raw,
            path: "/disk/disk.qcow2".into(),
            base: null().into(),
            writes: null().into(),
            host_boot: [7; 16],
        });
        let link = LinkConfig {
            mac: [2; 6],
            mtu: 1500,
            queues: 2,
            lease: None,
        };
        for (has_initramfs, has_console, count) in [(true, true, 10), (false, true, 9), (true, false, 7)] {
            let descriptor = |present: bool| present.then(|| OwnedFd::from(null()));
            let request = UserBootRequest {
                kvm: null().into(),
                size: SIZE,
                max_memory: 4 << 20,
                kernel: null().into(),
                initramfs: has_initramfs.then(|| null().into()),
                command_line: "console=ttyS0".to_owned(),
                uuid: [3; 16],
                console_input: descriptor(has_console),
                console_output: descriptor(has_console),
                oem_strings: Vec::new(),
                guest_agent: descriptor(has_console),
                links: vec![(link.clone(), vec![null().into(), null().into()])],
                disks: vec![(
                    "root".to_owned(),
                    BootDisk::CopyOnWrite {
                        image: image.clone(),
                        read_only: false,
                    },
                )],
                file_server: None,
            };

            let (command, descriptors) = request.into_command().unwrap();

            let Command::Boot(
                machine,
                Software::User {
                    initramfs,
                    console_input,
                    guest_agent,
                    links,
                    ..
                },
            ) = command
            else {
                panic!("{command:?}");
            };
            let copy_on_write = DiskAccess::CopyOnWrite {
                format: BaseFormat::Raw,
                host_boot: [7; 16],
                read_only: false,
            };
            let root = DiskConfig {
                serial: "root".to_owned(),
                access: copy_on_write,
            };
            assert_eq!(machine.disks, [root]);
            assert_eq!((machine.memory, machine.max_memory), (2 << 20, 4 << 20));
            assert_eq!((initramfs.is_some(), console_input), (has_initramfs, has_console));
            assert_eq!(guest_agent, has_console);
            assert_eq!(links, std::slice::from_ref(&link));
            assert_eq!(descriptors.len(), count);
        }
    }

    #[test]
    fn read_only_disk_is_opened_without_write_access_cve_2020_28914() {
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), [0; 512]).unwrap();
        for (read_only, expected) in [(true, Some(libc::EBADF)), (false, None)] {
            let disk = open_disk(image.path().to_owned(), read_only).unwrap();
            let written = std::os::unix::fs::FileExt::write_all_at(&*disk.file, b"guest", 0);
            assert_eq!(written.err().and_then(|error| error.raw_os_error()), expected);
        }
    }

    #[test]
    fn only_regular_files_and_block_devices_open_as_disks() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [
            fifo.as_path(),
            folder.path(),
            Path::new("/dev/null"),
            Path::new("/no/such/file"),
        ] {
            let error = open_disk(path.to_owned(), true).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        let image = folder.path().join("image");
        std::fs::write(&image, [0; 512]).unwrap();
        open_disk(image, false).unwrap();
    }
}
