//! What a machine boots with: every host resource, opened by the shim.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use crate::{
    control::{Command, DiskAccess, MachineConfig},
    guest_image::{GuestImage, GuestImageError},
    oci::PodSize,
};

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The machine's channels.
    #[error("make the channels of a virtual machine: {0}")]
    Descriptors(#[source] io::Error),
    /// A disk.
    #[error("open the disk {}: {source}", path.display())]
    Disk {
        /// The file or device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Kernel or initramfs.
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    /// KVM.
    #[error("/dev/kvm: {0}")]
    Kvm(String),
    /// The vmm process cannot be started.
    #[error("start the process of a virtual machine: {0}")]
    Spawn(#[source] io::Error),
}

/// A disk's backing.
#[derive(Debug)]
pub(crate) struct DiskFile {
    /// The file or block device, which [`open_disk`] opened.
    pub(crate) file: File,
    /// The guest may only read.
    pub(crate) read_only: bool,
}

/// The guest's own files and KVM: the same for every machine.
#[derive(Debug)]
pub(crate) struct GuestResources {
    /// `/dev/kvm`.
    pub(crate) kvm: OwnedFd,
    /// Kernel and initramfs.
    pub(crate) image: GuestImage,
    /// Words added to the kernel's command line.
    pub(crate) kernel_arguments: String,
}

/// All that a machine boots with.
#[derive(Debug)]
pub(crate) struct Boot {
    /// KVM, kernel, initramfs.
    pub(crate) guest: GuestResources,
    /// Memory and vCPUs.
    pub(crate) size: PodSize,
    /// The vhost-user socket of the fs process, if directories are shared.
    pub(crate) share: Option<OwnedFd>,
    /// The disks in the first disk slots.
    pub(crate) disks: Vec<DiskFile>,
    /// How many disk slots follow, for disks that come later.
    pub(crate) hotplug_disks: u32,
}

impl Boot {
    /// The command, and the descriptors in the order that it documents. `agent` is the stream of
    /// [`nutshell_protocol::AGENT_PORT`].
    pub(super) fn into_command(self, agent: OwnedFd) -> (Command, Vec<OwnedFd>) {
        let GuestResources {
            kvm,
            image,
            kernel_arguments,
        } = self.guest;
        let machine = MachineConfig {
            memory: self.size.boot.memory,
            max_memory: self.size.max.memory,
            vcpus: self.size.boot.vcpus,
            max_vcpus: self.size.max.vcpus,
            file_server: self.share.is_some(),
            disks: self.disks.iter().map(DiskFile::kind).collect(),
            hotplug_disks: self.hotplug_disks,
            kernel: image.kernel_extent,
            initramfs: image.initramfs_extent,
            kernel_arguments,
        };
        let mut descriptors = vec![kvm, image.kernel.into(), image.initramfs.into(), agent];
        descriptors.extend(self.share);
        descriptors.extend(self.disks.into_iter().map(|disk| disk.file.into()));
        (Command::Boot(machine), descriptors)
    }
}

impl DiskFile {
    fn kind(&self) -> DiskAccess {
        if self.read_only {
            DiskAccess::ReadOnly
        } else {
            DiskAccess::ReadWrite
        }
    }
}

/// Opens `/dev/kvm`, or says what to do.
pub(crate) fn open_kvm() -> Result<OwnedFd, BootError> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Ok(kvm.into()),
        Err(error) => Err(BootError::Kvm(match error.kind() {
            io::ErrorKind::NotFound => "does not exist: enable virtualization in the firmware, or nested \
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

/// Opens the file or block device behind a disk; nothing else is one.
pub(crate) fn open_disk(path: &Path, read_only: bool) -> Result<File, BootError> {
    let open = || {
        // Without O_NONBLOCK a fifo would hold the shim.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("neither a file nor a block device"));
        }
        let flags = rustix::fs::fcntl_getfl(file.as_fd())? - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(file.as_fd(), flags)?;
        Ok(file)
    };
    open().map_err(|source| BootError::Disk {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{control::Extent, oci::Size};

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    fn boot(share: Option<OwnedFd>, disks: Vec<DiskFile>) -> Boot {
        let extent = Extent { offset: 0, length: 0 };
        Boot {
            guest: GuestResources {
                kvm: null().into(),
                image: GuestImage {
                    kernel: null(),
                    kernel_extent: extent,
                    initramfs: null(),
                    initramfs_extent: extent,
                },
                kernel_arguments: String::new(),
            },
            size: PodSize::fixed(Size {
                memory: 2 << 20,
                vcpus: 1,
            }),
            share,
            disks,
            hotplug_disks: 0,
        }
    }

    #[test]
    fn descriptors_go_with_what_names_them() {
        let disk = |read_only| DiskFile {
            file: null(),
            read_only,
        };
        let disks = || vec![disk(true), disk(false)];
        for (share, count) in [(Some(null().into()), 7), (None, 6)] {
            let shared = share.is_some();
            let (command, descriptors) = boot(share, disks()).into_command(null().into());
            let Command::Boot(machine) = command else {
                panic!("{command:?}");
            };
            assert_eq!(machine.file_server, shared);
            assert_eq!(machine.disks, [DiskAccess::ReadOnly, DiskAccess::ReadWrite]);
            assert_eq!(descriptors.len(), count);
        }
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [
            fifo.as_path(),
            folder.path(),
            Path::new("/dev/null"),
            Path::new("/no/such/file"),
        ] {
            let error = open_disk(path, true).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        let image = folder.path().join("image");
        std::fs::write(&image, [0; 512]).unwrap();
        open_disk(&image, false).unwrap();
    }
}
