//! The annotations of virtual machines.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Component, Path, PathBuf},
};

use crate::oci::{DataSource, DiskContent, DiskName, OnReboot, PlanError, VmExec, VmKernel, size::VmGrowth};

/// The prefix of their names.
const PREFIX: &str = "io.containerd.nutshell.vm.";

/// Where the directory with a kernel is mounted.
pub(super) const KERNEL_MOUNT: &str = "/kernel";

/// The maximum length of additional kernel arguments, in bytes.
const MAX_KERNEL_ARGUMENTS: usize = 1024;

/// The size of the smallest and of the largest blank disk, in bytes. They also bound `max-memory`, which must fit the
/// host's limits too.
const MIN_BLANK_SIZE: u64 = 1 << 20;
const MAX_BLANK_SIZE: u64 = 64 << 40;

/// The checked annotations of a spec.
#[derive(Debug, Default)]
pub(super) struct Annotations {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    pub(super) kernel_arguments: String,
    pub(super) on_reboot: OnReboot,
    pub(super) exec: VmExec,
    pub(super) growth: VmGrowth,
    /// `None` means the default.
    pub(super) data_source: Option<DataSource>,
    /// By the name of the disk.
    pub(super) disks: BTreeMap<String, DiskAnnotation>,
}

/// Parsed from the annotation `disk.NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskAnnotation {
    pub(super) read_only: bool,
    pub(super) boot: bool,
    pub(super) content: DiskContent,
}

impl Annotations {
    pub(super) fn parse(annotations: &HashMap<String, String>) -> Result<Self, PlanError> {
        let mut parsed = Self::default();
        for (name, value) in annotations {
            if let Some(key) = name.strip_prefix(PREFIX) {
                parsed
                    .set(key, value)
                    .map_err(|reason| PlanError::invalid(format!("annotation {name}"), reason))?;
            }
        }
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "kernel" => self.kernel = Some(parse_relative_path(value)?),
            "initrd" => self.initramfs = Some(parse_relative_path(value)?),
            "kernel-arguments" => self.kernel_arguments = parse_kernel_arguments(value)?,
            "on-reboot" => {
                self.on_reboot = match value {
                    "restart" => OnReboot::Restart,
                    "exit" => OnReboot::Exit,
                    other => return Err(format!("{other:?} is neither \"restart\" nor \"exit\"")),
                }
            }
            "exec" => {
                self.exec = match value {
                    "auto" => VmExec::Auto,
                    "agent" => VmExec::Agent,
                    "qga" => VmExec::QemuGuestAgent,
                    "none" => VmExec::None,
                    other => {
                        return Err(format!(
                            "{other:?} is not one of \"auto\", \"agent\", \"qga\" and \"none\""
                        ));
                    }
                }
            }
            "max-memory" => self.growth.max_memory = Some(parse_size(value)?),
            "max-vcpus" => {
                let vcpus = value.parse().ok().filter(|vcpus| *vcpus > 0);
                self.growth.max_vcpus = Some(vcpus.ok_or_else(|| format!("{value:?} is not a number from 1 to 255"))?);
            }
            "datasource" => self.data_source = Some(value.parse()?),
            _ => {
                let Some(disk) = key.strip_prefix("disk.") else {
                    return Err(
                        "unknown: a virtual machine has the annotations datasource, disk.NAME, exec, initrd, \
                         kernel, kernel-arguments, max-memory, max-vcpus and on-reboot"
                            .to_owned(),
                    );
                };
                self.disks.insert(disk.to_owned(), parse_disk(value)?);
            }
        }
        Ok(())
    }

    /// The annotation for a disk, or the default.
    pub(super) fn disk(&self, name: &DiskName) -> DiskAnnotation {
        self.disks.get(name.as_str()).copied().unwrap_or(DiskAnnotation {
            read_only: false,
            boot: false,
            content: DiskContent::Detected,
        })
    }

    /// Whether an annotation selects what the machine boots, so that the image needs no disk.
    pub(super) fn has_boot_annotation(&self) -> bool {
        self.kernel.is_some() || self.disks.values().any(|disk| disk.boot)
    }

    /// The kernel. `directory` is the source of the mount at [`KERNEL_MOUNT`].
    pub(super) fn kernel(&self, directory: Option<PathBuf>) -> Result<VmKernel, PlanError> {
        let invalid = |reason: String| Err(PlanError::invalid(format!("annotation {PREFIX}kernel"), reason));
        match (&self.kernel, directory) {
            (None, None) if self.initramfs.is_none() => Ok(VmKernel::Disk),
            (Some(kernel), Some(directory)) => Ok(VmKernel::Files {
                directory,
                kernel: kernel.clone(),
                initramfs: self.initramfs.clone(),
            }),
            (None, _) => invalid(format!(
                "it is missing, but there is a mount at {KERNEL_MOUNT} or an initrd: set it to the path of the kernel \
                 in that mount"
            )),
            (Some(_), None) => invalid(format!("there is no mount at {KERNEL_MOUNT} with the kernel")),
        }
    }

    /// Refuses an annotation for a disk that is not one of `names`.
    pub(super) fn check_disks<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<(), PlanError> {
        match self.disks.keys().find(|disk| !names.clone().any(|name| name == *disk)) {
            None => Ok(()),
            Some(disk) => Err(PlanError::invalid(
                format!("annotation {PREFIX}disk.{disk}"),
                format!("there is no mount at /disks/{disk}"),
            )),
        }
    }
}

/// A path below a mount. A leading slash means the root of the mount.
fn parse_relative_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text.trim_start_matches('/'));
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if is_plain && path != Path::new("") {
        Ok(path.to_owned())
    } else {
        Err(format!("{text:?} is not the path of a file below {KERNEL_MOUNT}"))
    }
}

fn parse_kernel_arguments(text: &str) -> Result<String, String> {
    if text.len() > MAX_KERNEL_ARGUMENTS {
        return Err(format!(
            "{} bytes are more than the maximum of {MAX_KERNEL_ARGUMENTS}",
            text.len()
        ));
    }
    match text.chars().find(|character| !matches!(character, ' '..='~')) {
        None => Ok(text.trim().to_owned()),
        Some(character) => Err(format!("{character:?} is not a printable ASCII character")),
    }
}

/// Parses words that are separated by commas: `boot`, `ro`, `ephemeral`, and `blank` with `size=SIZE`.
fn parse_disk(text: &str) -> Result<DiskAnnotation, String> {
    let (mut read_only, mut boot, mut ephemeral, mut blank, mut size) = (false, false, false, false, None);
    for word in text.split(',') {
        match word.trim() {
            "ro" => read_only = true,
            "boot" => boot = true,
            "ephemeral" => ephemeral = true,
            "blank" => blank = true,
            word => match word.strip_prefix("size=") {
                Some(text) => size = Some(parse_size(text)?),
                None => return Err(format!("{word:?} is none of boot, ro, ephemeral, blank and size=SIZE")),
            },
        }
    }
    let content = match (ephemeral, blank, size) {
        (false, false, None) => DiskContent::Detected,
        (true, false, None) => DiskContent::Ephemeral,
        (false, true, Some(size)) => DiskContent::Blank { size },
        (true, true, _) => return Err("a blank disk cannot be ephemeral".to_owned()),
        (_, true, None) => return Err("a blank disk needs size=SIZE".to_owned()),
        (_, false, Some(_)) => return Err("size=SIZE is only for a blank disk".to_owned()),
    };
    if read_only && content != DiskContent::Detected {
        return Err("a blank or ephemeral disk cannot be read-only".to_owned());
    }
    Ok(DiskAnnotation {
        read_only,
        boot,
        content,
    })
}

/// A size in bytes, with an optional suffix of Kubernetes (`Ki`, `Mi`, `Gi`, `Ti`). Rounded up to whole sectors.
fn parse_size(text: &str) -> Result<u64, String> {
    let invalid = || format!("the size {text:?} is not a number of bytes, or of Ki, Mi, Gi or Ti");
    let suffixes = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40)];
    let found = suffixes
        .into_iter()
        .find_map(|(suffix, shift)| Some((text.strip_suffix(suffix)?, shift)));
    let (number, shift) = found.unwrap_or((text, 0));
    let number: u64 = number.parse().map_err(|_| invalid())?;
    let size = number.checked_mul(1 << shift).ok_or_else(invalid)?;
    if !(MIN_BLANK_SIZE..=MAX_BLANK_SIZE).contains(&size) {
        return Err(format!("the size {text} is not between 1Mi and 64Ti"));
    }
    Ok(size.next_multiple_of(512))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_disk_are_parsed() {
        for (text, read_only, boot, content) in [
            ("ro", true, false, DiskContent::Detected),
            ("boot", false, true, DiskContent::Detected),
            ("ephemeral, boot", false, true, DiskContent::Ephemeral),
            ("blank,size=10Gi", false, false, DiskContent::Blank { size: 10 << 30 }),
            (
                "size=1048577,blank",
                false,
                false,
                DiskContent::Blank { size: 1_049_088 },
            ),
        ] {
            let expected = DiskAnnotation {
                read_only,
                boot,
                content,
            };
            assert_eq!(parse_disk(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn contradicting_words_of_a_disk_are_refused() {
        for (text, expected) in [
            ("rw", "\"rw\" is none of"),
            ("", "\"\" is none of"),
            ("blank", "needs size=SIZE"),
            ("size=1Gi", "only for a blank disk"),
            ("blank,size=1Gi,ephemeral", "cannot be ephemeral"),
            ("ephemeral,ro", "cannot be read-only"),
            ("blank,size=1G", "the size \"1G\" is not a number"),
            ("blank,size=1Ki", "not between 1Mi and 64Ti"),
            ("blank,size=99999999999Ti", "is not a number of bytes"),
        ] {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
