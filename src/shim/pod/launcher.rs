//! Starts the processes and opens the files of a pod. Tests use another launcher.

use std::{fmt::Debug, io, os::fd::OwnedFd};

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::{
    control::BoardKind,
    guest_image,
    shim::{
        blocking,
        configuration::Configuration,
        machine::{BootDisk, BootError, GuestResources, VmmProcess, open_agent_disk, open_kvm},
        share::{FileServer, ShareError},
    },
};

use super::error::PodError;

/// Starts the processes of a pod. All methods are called on the shim's main thread: the kernel kills a child when the
/// thread that started it ends.
#[async_trait]
pub(crate) trait Launcher: Debug + Send + Sync + 'static {
    /// Opens `/dev/kvm` and the guest's files.
    async fn open_guest_resources(&self) -> Result<GuestResources, PodError>;
    /// Opens `/dev/kvm` and the files of the guest that reads disks.
    fn open_disk_reader_resources(&self) -> Result<GuestResources, BootError>;
    /// Opens `/dev/kvm`.
    fn open_kvm(&self) -> Result<OwnedFd, BootError>;
    /// Opens the disk with the agent for the guest of a user's kernel.
    fn open_agent_disk(&self) -> Result<BootDisk, BootError>;
    /// Starts a vmm process, which waits for its first command.
    fn spawn_vmm(&self) -> io::Result<VmmProcess>;
    /// Starts a file server in the namespaces of the process `vmm`, a pidfd, and returns it with the socket through
    /// which the vmm reaches it. `None` if this launcher starts no file servers, as in tests.
    fn spawn_file_server(&self, vmm: Option<OwnedFd>) -> Result<Option<(FileServer, OwnedFd)>, ShareError>;
}

/// Starts real processes on this host, unlike the launcher of the tests.
#[derive(Debug)]
pub(crate) struct HostLauncher {
    configuration: Configuration,
    /// Started in advance, so that the first machine does not wait for a process.
    spare_vmm: Mutex<Option<VmmProcess>>,
}

impl HostLauncher {
    /// Starts a first vmm process at once. Call it on the shim's main thread. Needs the Tokio runtime.
    pub(crate) fn new(configuration: Configuration) -> Self {
        let vmm = VmmProcess::spawn()
            .inspect_err(|error| {
                log::warn!("cannot start a vmm process in advance, the first pod starts its own: {error}")
            })
            .ok();
        Self {
            configuration,
            spare_vmm: Mutex::new(vmm),
        }
    }
}

#[async_trait]
impl Launcher for HostLauncher {
    async fn open_guest_resources(&self) -> Result<GuestResources, PodError> {
        let Configuration { kernel, initramfs, .. } = &self.configuration;
        let image = if kernel.is_none() && initramfs.is_none() {
            // In this executable, so that no other file system is involved.
            guest_image::open(None, None)
        } else {
            let (kernel, initramfs) = (kernel.clone(), initramfs.clone());
            let open = move || guest_image::open(kernel.as_deref(), initramfs.as_deref());
            blocking::run("open the configured kernel and initramfs of the guest", open).await?
        };
        Ok(GuestResources {
            kvm: open_kvm()?,
            image: image.map_err(BootError::from)?,
            kernel_arguments: self.configuration.kernel_arguments.clone(),
            board: self.configuration.board,
        })
    }

    fn open_disk_reader_resources(&self) -> Result<GuestResources, BootError> {
        Ok(GuestResources {
            kvm: open_kvm()?,
            image: guest_image::open_disk_reader()?,
            kernel_arguments: String::new(),
            board: BoardKind::Container,
        })
    }

    fn open_kvm(&self) -> Result<OwnedFd, BootError> {
        open_kvm()
    }

    fn open_agent_disk(&self) -> Result<BootDisk, BootError> {
        open_agent_disk()
    }

    fn spawn_vmm(&self) -> io::Result<VmmProcess> {
        match self.spare_vmm.lock().take() {
            Some(vmm) => Ok(vmm),
            None => VmmProcess::spawn(),
        }
    }

    fn spawn_file_server(&self, vmm: Option<OwnedFd>) -> Result<Option<(FileServer, OwnedFd)>, ShareError> {
        FileServer::spawn(vmm).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nutshell_fixtures::HungVolume;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn configured_kernel_on_a_file_system_that_hangs_is_an_error_in_time() {
        let volume = HungVolume::mount_temporary();
        let empty = tempfile::NamedTempFile::new().unwrap();
        let launcher = HostLauncher {
            configuration: Configuration {
                kernel: Some(volume.path().join("vmlinux")),
                ..Configuration::load(Some(empty.path())).unwrap()
            },
            spare_vmm: Mutex::default(),
        };

        let mut open = launcher.open_guest_resources();
        tokio::time::timeout(Duration::ZERO, &mut open).await.unwrap_err();
        volume.wait_for_request();
        tokio::time::advance(blocking::FILE_SYSTEM_LIMIT).await;
        let error = open.await.unwrap_err();

        assert!(matches!(error, PodError::Blocking(_)), "{error}");
    }
}
