//! The plan of a virtual machine that boots a user's disk or kernel.

use std::{path::PathBuf, str::FromStr};

use super::{CgroupPath, Hooks, HostFiles, Limits, Network, Placement, PodSize, Share};

/// The maximum length of a disk's name in bytes: that of its serial (virtio 1.3 §5.2.6, `VIRTIO_BLK_T_GET_ID`).
const MAX_DISK_NAME: usize = 20;

/// The maximum number of disks of a virtual machine besides those of the image, the seed and the agent. Each has up to
/// two descriptors in the boot command.
pub(crate) const MAX_VM_DISKS: usize = 10;

/// The resources and settings of a virtual machine that boots a user's disk or kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmPlan {
    pub(crate) placement: Placement,
    pub(crate) identity: VmIdentity,
    pub(crate) kernel: VmKernel,
    /// Appended to the kernel's command line.
    pub(crate) kernel_arguments: String,
    pub(crate) on_reboot: OnReboot,
    pub(crate) exec: VmExec,
    /// In the order of the spec.
    pub(crate) disks: Vec<VmDisk>,
    pub(crate) seed: Option<VmSeed>,
    /// Directories and files of the host that the guest can mount. `path` is the path of the mount in the spec.
    pub(crate) shares: Vec<Share>,
    /// The user with whose permissions files of volumes are opened.
    pub(crate) user: FileUser,
    pub(crate) network: Network,
    /// The host name of the guest.
    pub(crate) hostname: Option<String>,
    /// The file of the host with the DNS servers for the guest.
    pub(crate) resolv_conf: Option<PathBuf>,
    pub(crate) size: PodSize,
    /// The limits of the container, which determine `size` unless annotations do.
    pub(crate) limits: Limits,
    /// The control group of the machine on the host. `None` means that of the shim.
    pub(crate) cgroup: Option<CgroupPath>,
    /// The `oom_score_adj` of the machine on the host.
    pub(crate) oom_score_adj: i32,
    /// The hooks that run on the host.
    pub(crate) hooks: Hooks,
}

/// Whether this host runs virtual machines with a user's disk, and their limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmPolicy {
    pub(crate) enabled: bool,
    /// The maximum number of disks besides those of the image, the seed and the agent, at most [`MAX_VM_DISKS`].
    pub(crate) max_disks: usize,
}

impl Default for VmPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            max_disks: MAX_VM_DISKS,
        }
    }
}

/// The files of the image of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmImage(pub(crate) HostFiles);

/// What identifies a virtual machine to its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VmIdentity {
    /// The machine is outside of Kubernetes. The path of its bundle contains the names of containerd's namespace and of
    /// the container. The guest's writes are kept when the same container starts again.
    Bundle(PathBuf),
    /// The machine's root file system does not outlive its pod, which has this UID.
    Pod(String),
    /// The machine's root file system persists, and the next pod with these names is the same machine.
    Names {
        namespace: String,
        pod: String,
        container: String,
    },
}

/// The kernel that a virtual machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VmKernel {
    /// The kernel that the boot loader of the machine's first disk would boot.
    Disk,
    /// Files below a directory of the host. Symbolic links in it may be followed, but not out of it.
    Files {
        /// The source of the mount at `/kernel`.
        directory: PathBuf,
        /// Relative to `directory`.
        kernel: PathBuf,
        /// Relative to `directory`.
        initramfs: Option<PathBuf>,
    },
}

/// What happens when the guest resets the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum OnReboot {
    /// It boots again.
    #[default]
    Restart,
    /// The task ends.
    Exit,
}

/// Which agents in the guest may run the processes of Exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum VmExec {
    /// nutshell's agent, if it is connected, or else the QEMU guest agent.
    #[default]
    Auto,
    Agent,
    QemuGuestAgent,
    None,
}

impl VmExec {
    /// Whether the guest gets nutshell's agent.
    pub(crate) fn has_agent(self) -> bool {
        matches!(self, Self::Auto | Self::Agent)
    }

    /// Whether the machine has a port for the QEMU guest agent.
    pub(crate) fn has_guest_agent_port(self) -> bool {
        matches!(self, Self::Auto | Self::QemuGuestAgent)
    }
}

/// A disk that is not in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmDisk {
    pub(crate) name: DiskName,
    pub(crate) source: DiskSource,
    /// The guest can only read.
    pub(crate) read_only: bool,
    /// The machine boots from it.
    pub(crate) is_boot_disk: bool,
}

/// The source of a disk on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DiskSource {
    /// The mount at `/disks/NAME`.
    Volume {
        path: PathBuf,
        content: DiskContent,
        /// The mount is read-only. The guest can only read a raw disk then.
        is_read_only: bool,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
}

/// What a volume contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskContent {
    /// Depends on the files of the volume: `disk.img` is a raw disk that the guest writes, and any other single file is
    /// an image that is never written.
    Detected,
    /// Like [`Self::Detected`], but the guest's writes are removed with the container even if the disk is raw.
    Ephemeral,
    /// A raw disk of `size` bytes, which is created as `disk.img` unless it exists.
    Blank { size: u64 },
}

/// The name of a disk, which is its serial in the guest: 1 to 20 letters, digits, dots, hyphens and underscores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskName(String);

impl DiskName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DiskName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let starts_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
        if starts_well && name.len() <= MAX_DISK_NAME && name.bytes().all(is_plain) {
            Ok(Self(name.to_owned()))
        } else {
            Err(format!(
                "the name {name:?} of a disk must have 1 to {MAX_DISK_NAME} ASCII letters, digits, '-', '.' or '_', and \
                 start with a letter or digit"
            ))
        }
    }
}

/// The configuration for the guest's software on first boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmSeed {
    /// The source of the mount at `/cloud-init`.
    pub(crate) directory: PathBuf,
    pub(crate) source: DataSource,
}

/// How the guest's software finds and reads its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum DataSource {
    /// cloud-init's data source NoCloud: a file system with the label `CIDATA`.
    #[default]
    NoCloud,
    /// OpenStack's configuration drive: a file system with the label `config-2`. cloud-init reads it.
    ConfigDrive,
    /// Ignition reads the user data of a configuration drive, as its provider `kubevirt` does: the label must be in
    /// lower case, because Ignition waits for `/dev/disk/by-label/config-2`.
    Ignition,
}

impl FromStr for DataSource {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "nocloud" => Ok(Self::NoCloud),
            "configdrive" => Ok(Self::ConfigDrive),
            "ignition" => Ok(Self::Ignition),
            _ => Err(format!("{name:?} is none of nocloud, configdrive and ignition")),
        }
    }
}

/// The user with whose permissions files of volumes are opened: that of the container's process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct FileUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_disk_fits_into_its_serial() {
        for name in ["data", "a", "db-1.x_2", "12345678901234567890"] {
            assert_eq!(name.parse::<DiskName>().unwrap().as_str(), name);
        }
        for name in ["", "-a", "a/b", "a b", "ä", "123456789012345678901"] {
            name.parse::<DiskName>().unwrap_err();
        }
    }
}
