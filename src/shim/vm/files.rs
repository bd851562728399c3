//! The files of the host that a virtual machine needs. They are opened in one step, on a thread that may block, when
//! the task is created.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nutshell_protocol::AGENT_DISK;

use super::{
    agent_service,
    disk::ImageRoot,
    error::VmError,
    kernel::{BootFiles, CacheEntry, KernelSource, open_kernel_files},
    seed::{
        self, Identity, KeyDirectory, SeedError,
        identity::{Hostname, InstanceId},
    },
    volumes::{self, OpenedDisk},
};
use crate::{
    oci::{DataSource, Share, VmIdentity, VmKernel, VmPlan, VmSeed},
    shim::{machine::DiskImage, network::NetworkNames},
};

/// The serial of the disk in the image.
const IMAGE_DISK: &str = "root";

/// The serial of the seed.
const SEED_DISK: &str = "seed";

/// The host name in a seed if the machine has none.
const DEFAULT_HOSTNAME: &str = "nutshell";

/// The maximum length of a `resolv.conf` that is read, in bytes.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// Identifies the host (machine-id(5)). Guests get only a hash of it.
const HOST_ID: &str = "/etc/machine-id";

/// Ignition reads a configuration drive with this kernel argument.
const IGNITION_ARGUMENT: &str = "ignition.platform.id=kubevirt";

/// The opened files of a virtual machine.
#[derive(Debug)]
pub(crate) struct VmFiles {
    /// With their serials. The first one is the disk that the machine boots from.
    pub(super) disks: Vec<(String, OpenedDisk)>,
    pub(super) kernel: KernelSource,
    /// The kernel for the first boot, if the cache has it.
    pub(super) cached_kernel: Option<BootFiles>,
    /// Where the disk's kernel is stored after the disk reader has read it.
    pub(super) cache_entry: Option<CacheEntry>,
    /// Identifies the machine to its guest, in the byte order of RFC 9562.
    pub(super) uuid: [u8; 16],
    pub(super) names: NetworkNames,
    /// Directories and files that the guest can mount.
    pub(super) shares: Vec<Share>,
    /// Appended to the kernel's command line.
    pub(super) kernel_arguments: String,
}

impl VmFiles {
    /// Opens the files of `plan`. `image_disk` is the disk of the image at `root`, and `cache_entry` the place of that
    /// disk's kernel in the cache. Blocks on file systems of the host.
    ///
    /// # Errors
    ///
    /// A file cannot be opened, or does not have the kind that the plan requires; or there is nothing to boot.
    pub(crate) fn open(
        plan: &VmPlan,
        root: &ImageRoot,
        image_disk: Option<DiskImage>,
        cache_entry: Option<CacheEntry>,
    ) -> Result<Self, VmError> {
        let instance = find_instance_id(&plan.identity);
        let mut disks = Vec::new();
        for disk in &plan.disks {
            let opened = volumes::open(disk, root, &plan.user)?;
            let position = if disk.is_boot_disk { 0 } else { disks.len() };
            disks.insert(position, (disk.name.as_str().to_owned(), opened));
        }
        let has_boot_disk = plan.disks.iter().any(|disk| disk.is_boot_disk);
        if let Some(image) = image_disk {
            let position = usize::from(has_boot_disk);
            disks.insert(
                position,
                (
                    IMAGE_DISK.to_owned(),
                    OpenedDisk::Image {
                        image: Arc::new(image),
                        read_only: false,
                    },
                ),
            );
        } else if !has_boot_disk && plan.kernel == VmKernel::Disk {
            return Err(VmError::NoDisk);
        }
        let mut kernel_arguments = plan.kernel_arguments.clone();
        if let Some(seed) = &plan.seed {
            disks.push((SEED_DISK.to_owned(), make_seed(seed, &instance, plan)?));
            if seed.source == DataSource::Ignition {
                kernel_arguments = format!("{kernel_arguments} {IGNITION_ARGUMENT}").trim().to_owned();
            }
        }
        refuse_equal_serials(&disks, plan.exec.has_agent())?;
        let cache_entry = cache_entry.filter(|_| plan.kernel == VmKernel::Disk && !has_boot_disk);
        let cached_kernel = cache_entry.as_ref().and_then(|entry| {
            let loaded = entry.load().map_err(|error| {
                log::warn!("the kernel of a disk is read again, because its entry in the cache is damaged: {error}");
            });
            loaded.ok().flatten()
        });
        Ok(Self {
            disks,
            cached_kernel,
            cache_entry,
            kernel: match &plan.kernel {
                VmKernel::Disk => KernelSource::Disk,
                VmKernel::Files {
                    directory,
                    kernel,
                    initramfs,
                } => KernelSource::Files(open_kernel_files(directory, kernel, initramfs.as_deref(), &plan.user)?),
            },
            uuid: instance.uuid(),
            names: NetworkNames {
                resolv_conf: read_resolv_conf(plan.resolv_conf.as_deref())?,
                hostname: plan.hostname.clone(),
            },
            shares: plan.shares.clone(),
            kernel_arguments,
        })
    }
}

/// Fails if two disks have the same serial: guests and messages identify a disk by its serial.
fn refuse_equal_serials(disks: &[(String, OpenedDisk)], has_agent_disk: bool) -> Result<(), VmError> {
    let mut serials = HashSet::new();
    if has_agent_disk {
        serials.insert(AGENT_DISK);
    }
    match disks.iter().find(|(serial, _)| !serials.insert(serial.as_str())) {
        None => Ok(()),
        Some((serial, _)) => Err(VmError::Volume {
            name: serial.clone(),
            reason: format!(
                "two disks have this name. The disk in the image is named {IMAGE_DISK}, the seed {SEED_DISK}, and the \
                 disk of the agent {AGENT_DISK}: change the mount's path"
            ),
        }),
    }
}

fn make_seed(seed: &VmSeed, instance: &InstanceId, plan: &VmPlan) -> Result<OpenedDisk, VmError> {
    let default = || Hostname::parse(DEFAULT_HOSTNAME);
    let hostname = plan
        .hostname
        .as_deref()
        .and_then(|name| Hostname::parse(name).ok())
        .map_or_else(default, Ok);
    let identity = Identity {
        instance_id: instance.clone(),
        hostname: hostname.map_err(|error| VmError::Volume {
            name: SEED_DISK.to_owned(),
            reason: error.to_string(),
        })?,
    };
    let vendor_data = plan.exec.has_agent().then(agent_service::vendor_data);
    let directory = KeyDirectory::find(&seed.directory).map_err(SeedError::from)?;
    let make = || seed::make_disk(&directory, seed.source, &identity, vendor_data).map_err(VmError::from);
    Ok(OpenedDisk::Raw {
        file: volumes::as_user(&plan.user, make)?.into(),
        path: PathBuf::from("/cloud-init"),
        read_only: true,
    })
}

/// The id that cloud-init compares with that of its last run: a new one makes it configure the guest again.
fn find_instance_id(identity: &VmIdentity) -> InstanceId {
    match identity {
        VmIdentity::Names {
            namespace,
            pod,
            container,
        } => InstanceId::of_persistent_root(namespace, pod, container),
        VmIdentity::Pod(uid) => InstanceId::of_pod(uid),
        // Hosts without this file all have the same id.
        VmIdentity::Bundle(bundle) => {
            InstanceId::of_bundle(&std::fs::read_to_string(HOST_ID).unwrap_or_default(), bundle)
        }
    }
}

/// Reads the file with the DNS servers. Returns an empty text if `path` is `None`.
fn read_resolv_conf(path: Option<&Path>) -> Result<String, VmError> {
    let Some(path) = path else { return Ok(String::new()) };
    let read = || -> io::Result<String> {
        let mut text = String::new();
        // Without O_NONBLOCK, opening a fifo would block.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        file.take(MAX_RESOLV_CONF).read_to_string(&mut text)?;
        Ok(text)
    };
    read().map_err(|source| VmError::ResolvConf {
        path: path.to_owned(),
        source,
    })
}
