//! The host's configuration. The default file is `/etc/nutshell/config.toml`. containerd's configuration of the runtime
//! can replace it with another file (`ConfigPath`) or with the `options` section itself (containerd
//! `docs/cri/config.md`). All keys are optional:
//!
//! ```toml
//! debug = false                  # log debug messages
//!
//! [guest]                        # replaces parts of the guest that this executable contains
//! kernel = "/path/to/vmlinux"
//! initramfs = "/path/to/initramfs.cpio"   # from the same build as this executable
//! kernel_arguments = ""          # appended to the kernel's command line
//! board = "container"            # or "pc": PCI and ACPI, for a kernel that supports them; the embedded one does not
//! ready_timeout_seconds = 8      # how long the boot may make no progress; a boot may take 30 times that in total
//! shell = true                   # whether root may open a shell in a guest
//!
//! [machine]                      # sizes; `oci` documents which containers they apply to
//! default_memory_mib = 512
//! default_vcpus = 1
//! max_memory_mib = 8192          # default: the host's memory
//! max_vcpus = 8                  # default: the host's CPUs
//!
//! [pod]
//! host_namespaces = "refuse"     # or "pod": hostPID and hostIPC then mean the namespaces of the pod
//!                                # or "pod-and-network": hostNetwork also means the network of the pod
//!
//! [storage]
//! mount_layers = true            # false: containerd mounts the layers of its EROFS snapshotter on the host
//!
//! [vm]                           # virtual machines with a user's disk
//! enabled = true                 # false: they are refused
//! max_disks = 10                 # per machine: volumes and block devices that become disks, 0 to 10
//! kernel_cache_mib = 256         # the size of the cache of kernels in images; 0: no cache
//! ```
//!
//! An unknown key is an error, so that a misspelt limit does not go unnoticed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    control::BoardKind,
    oci::{DEFAULT_MEMORY, DEFAULT_VCPUS, HostNamespaces, MAX_VCPUS, MAX_VM_DISKS, MIN_MEMORY, Sizing, VmPolicy},
};

/// The configuration that applies if containerd names no other.
const DEFAULT_PATH: &str = "/etc/nutshell/config.toml";

/// In seconds.
const DEFAULT_READY_TIMEOUT: u64 = 8;

/// The size of a kernel with its initrd is about 50 MiB.
const DEFAULT_KERNEL_CACHE_MIB: u64 = 256;

/// The host's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    /// The path of a guest kernel (ELF `vmlinux` or `bzImage`) that replaces the embedded one.
    pub(crate) kernel: Option<PathBuf>,
    /// The path of an initramfs that replaces the embedded one. Must be from the same build: the encoding of the
    /// messages between shim and agent has no versions.
    pub(crate) initramfs: Option<PathBuf>,
    /// Appended to the kernel's command line.
    pub(crate) kernel_arguments: String,
    /// The board that the kernel of containers boots on.
    pub(crate) board: BoardKind,
    /// How long a booting guest may make no progress until its agent answers. Time in which the guest waits for a CPU
    /// of the host does not count.
    pub(crate) ready_timeout: Duration,
    /// Whether an administrator may open a shell in a guest.
    pub(crate) shell: bool,
    /// Default and maximum sizes of machines.
    pub(crate) sizing: Sizing,
    /// The meaning of hostPID, hostIPC and hostNetwork.
    pub(crate) host_namespaces: HostNamespaces,
    /// Whether containerd is to leave the layers of its EROFS snapshotter to this runtime. Only the value in the
    /// default configuration file matters: containerd asks once for all uses of the runtime (`-info`).
    pub(crate) mount_layers: bool,
    pub(crate) virtual_machines: VmPolicy,
    /// The size of the cache of kernels in images, in bytes; 0 for none.
    pub(crate) kernel_cache_bytes: u64,
    /// Log debug messages.
    pub(crate) debug: bool,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigurationError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// The file is not TOML, or has an unknown key or an invalid value.
    #[error("configuration {}: {reason}", path.display())]
    Malformed {
        path: PathBuf,
        /// Line, key and error, in one line.
        reason: String,
    },
}

impl Configuration {
    /// Reads the file at `path`, or the default one, which need not exist.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or its content is invalid.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, ConfigurationError> {
        let (path, optional) = path.map_or((Path::new(DEFAULT_PATH), true), |path| (path, false));
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if optional && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(ConfigurationError::Unreadable {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, &HostCapacity::of_this_host()).map_err(|reason| ConfigurationError::Malformed {
            path: path.to_owned(),
            reason,
        })
    }

    fn parse(text: &str, host: &HostCapacity) -> Result<Self, String> {
        let document: Document = toml::from_str(text).map_err(|error| one_line(text, &error))?;
        let Document {
            debug,
            guest,
            machine,
            pod,
            storage,
            vm,
        } = document;
        for (key, path) in [("guest.kernel", &guest.kernel), ("guest.initramfs", &guest.initramfs)] {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(format!("{key} must be an absolute path"));
            }
        }
        let seconds = guest.ready_timeout_seconds.unwrap_or(DEFAULT_READY_TIMEOUT);
        let ready_timeout = check_range("guest.ready_timeout_seconds", seconds, 1, 600)?;
        Ok(Self {
            kernel: guest.kernel,
            initramfs: guest.initramfs,
            kernel_arguments: guest.kernel_arguments,
            board: guest.board,
            ready_timeout: Duration::from_secs(ready_timeout),
            shell: guest.shell.unwrap_or(true),
            sizing: machine.sizing(host)?,
            host_namespaces: pod.host_namespaces,
            mount_layers: storage.mount_layers.unwrap_or(true),
            virtual_machines: vm.policy()?,
            kernel_cache_bytes: vm.kernel_cache_bytes()?,
            debug,
        })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    debug: bool,
    guest: GuestSection,
    machine: MachineSection,
    pod: PodSection,
    storage: StorageSection,
    vm: VmSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "the table [storage]")]
struct StorageSection {
    mount_layers: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "the table [vm]")]
struct VmSection {
    enabled: Option<bool>,
    max_disks: Option<u64>,
    kernel_cache_mib: Option<u64>,
}

impl VmSection {
    fn policy(&self) -> Result<VmPolicy, String> {
        let default = VmPolicy::default();
        let max_disks = match self.max_disks {
            Some(disks) => check_range("vm.max_disks", disks, 0, MAX_VM_DISKS as u64)?,
            None => default.max_disks as u64,
        };
        Ok(VmPolicy {
            enabled: self.enabled.unwrap_or(default.enabled),
            max_disks: usize::try_from(max_disks).map_err(|error| format!("vm.max_disks: {error}"))?,
        })
    }

    fn kernel_cache_bytes(&self) -> Result<u64, String> {
        let mib = self.kernel_cache_mib.unwrap_or(DEFAULT_KERNEL_CACHE_MIB);
        Ok(check_range("vm.kernel_cache_mib", mib, 0, u64::MAX >> 20)? << 20)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "the table [pod]")]
struct PodSection {
    host_namespaces: HostNamespaces,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "the table [guest]")]
struct GuestSection {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    kernel_arguments: String,
    board: BoardKind,
    ready_timeout_seconds: Option<u64>,
    shell: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "the table [machine]")]
struct MachineSection {
    default_memory_mib: Option<u64>,
    default_vcpus: Option<u64>,
    max_memory_mib: Option<u64>,
    max_vcpus: Option<u64>,
}

impl MachineSection {
    fn sizing(&self, host: &HostCapacity) -> Result<Sizing, String> {
        const MAX_MIB: u64 = u64::MAX >> 20;
        let min_memory_mib = MIN_MEMORY >> 20;
        let max_memory_mib = match self.max_memory_mib {
            Some(mib) => check_range("machine.max_memory_mib", mib, min_memory_mib, MAX_MIB)?,
            None => (host.memory >> 20).max(min_memory_mib),
        };
        let max_vcpus = match self.max_vcpus {
            Some(vcpus) => check_range("machine.max_vcpus", vcpus, 1, MAX_VCPUS.into())?,
            None => u64::from(MAX_VCPUS).min(host.cpus.into()),
        };
        let default_memory_mib = match self.default_memory_mib {
            Some(mib) => check_range("machine.default_memory_mib", mib, min_memory_mib, max_memory_mib)?,
            None => (DEFAULT_MEMORY >> 20).min(max_memory_mib),
        };
        let default_vcpus = match self.default_vcpus {
            Some(vcpus) => check_range("machine.default_vcpus", vcpus, 1, max_vcpus)?,
            None => DEFAULT_VCPUS.into(),
        };
        let vcpus = |count| u8::try_from(count).map_err(|_| format!("machine: too many vCPUs: {count}"));
        Ok(Sizing {
            default_memory: default_memory_mib << 20,
            default_vcpus: vcpus(default_vcpus)?,
            max_memory: max_memory_mib << 20,
            max_vcpus: vcpus(max_vcpus)?,
        })
    }
}

/// The memory and CPUs of a host: the default maximum size of a machine.
struct HostCapacity {
    /// Bytes.
    memory: u64,
    cpus: u32,
}

impl HostCapacity {
    fn of_this_host() -> Self {
        let info = rustix::system::sysinfo();
        Self {
            memory: info.totalram.saturating_mul(info.mem_unit.into()),
            cpus: rustix::thread::sched_getaffinity(None)
                .map_or(1, |cpus| cpus.count())
                .max(1),
        }
    }
}

/// Returns `value` if it is in the range, else an error that names `key`.
fn check_range(key: &str, value: u64, min: u64, max: u64) -> Result<u64, String> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{key} = {value} is not within {min} to {max}"))
    }
}

/// Formats a parser error as one line, because containerd shows only one.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let line = error
        .span()
        .and_then(|span| text.get(..span.start))
        .map(|before| before.matches('\n').count() + 1);
    let message = error.message().lines().collect::<Vec<_>>().join(" ");
    line.map_or(message.clone(), |line| format!("line {line}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostCapacity = HostCapacity {
        memory: 16 << 30,
        cpus: 128,
    };

    #[test]
    fn empty_configuration_has_defaults_bounded_by_the_host() {
        let configuration = Configuration::parse("", &HOST).unwrap();
        let expected = Configuration {
            kernel: None,
            initramfs: None,
            kernel_arguments: String::new(),
            board: BoardKind::Container,
            ready_timeout: Duration::from_secs(8),
            shell: true,
            sizing: Sizing {
                default_memory: 512 << 20,
                default_vcpus: 1,
                max_memory: 16 << 30,
                max_vcpus: 64,
            },
            host_namespaces: HostNamespaces::Refuse,
            mount_layers: true,
            virtual_machines: VmPolicy {
                enabled: true,
                max_disks: 10,
            },
            kernel_cache_bytes: 256 << 20,
            debug: false,
        };
        assert_eq!(configuration, expected);
        let small = HostCapacity {
            memory: 256 << 20,
            cpus: 1,
        };
        let sizing = Configuration::parse("", &small).unwrap().sizing;
        assert_eq!((sizing.default_memory, sizing.max_vcpus), (256 << 20, 1));
    }

    #[test]
    fn every_key_is_accepted() {
        let text = r#"
            debug = true
            [guest]
            kernel = "/boot/vmlinux"
            initramfs = "/boot/initramfs"
            kernel_arguments = "quiet loglevel=1"
            board = "pc"
            ready_timeout_seconds = 30
            shell = false
            [machine]
            default_memory_mib = 256
            default_vcpus = 2
            max_memory_mib = 1024
            max_vcpus = 4
            [pod]
            host_namespaces = "pod"
            [storage]
            mount_layers = false
            [vm]
            enabled = false
            max_disks = 2
            kernel_cache_mib = 0
        "#;
        let configuration = Configuration::parse(text, &HOST).unwrap();
        let expected = Configuration {
            kernel: Some("/boot/vmlinux".into()),
            initramfs: Some("/boot/initramfs".into()),
            kernel_arguments: "quiet loglevel=1".to_owned(),
            board: BoardKind::Pc,
            ready_timeout: Duration::from_secs(30),
            shell: false,
            sizing: Sizing {
                default_memory: 256 << 20,
                default_vcpus: 2,
                max_memory: 1 << 30,
                max_vcpus: 4,
            },
            host_namespaces: HostNamespaces::Pod,
            mount_layers: false,
            virtual_machines: VmPolicy {
                enabled: false,
                max_disks: 2,
            },
            kernel_cache_bytes: 0,
            debug: true,
        };
        assert_eq!(configuration, expected);
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_one_line_errors_that_name_the_key() {
        for (text, named) in [
            ("kernal = \"/x\"", "kernal"),
            ("[guest]\n\nkernel_args = \"x\"", "kernel_args"),
            ("[machines]", "machines"),
            ("[machine]\nmax_vcpus = 65", "machine.max_vcpus"),
            ("[machine]\nmax_vcpus = 2\ndefault_vcpus = 3", "machine.default_vcpus"),
            ("[machine]\ndefault_memory_mib = 1", "machine.default_memory_mib"),
            ("[machine]\nmax_memory_mib = 18446744073709", "machine.max_memory_mib"),
            ("[guest]\nready_timeout_seconds = 0", "guest.ready_timeout_seconds"),
            ("[guest]\nkernel = \"vmlinux\"", "guest.kernel"),
            ("[pod]\nhost_namespaces = \"host\"", "host"),
            ("[vm]\nmax_disks = 11", "vm.max_disks = 11 is not within 0 to 10"),
            ("[vm]\nkernel_cache_mib = 18446744073709551615", "vm.kernel_cache_mib"),
            ("[vm]\nenabled = 1", "line 2"),
            ("[vm]\nmax_disk = 1", "max_disk"),
            ("vm = 5", "expected the table [vm]"),
            ("debug = \"yes\"", "line 1"),
            ("debug = true\nkernal = 1", "line 2"),
            ("machine = 5", "expected the table [machine]"),
            ("[guest]\nkernel = ", "line 2"),
        ] {
            let error = Configuration::parse(text, &HOST).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn named_file_must_exist() {
        let error = Configuration::load(Some(Path::new("/no/such/config.toml"))).unwrap_err();
        assert!(error.to_string().contains("/no/such/config.toml"), "{error}");
    }
}
