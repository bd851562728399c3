//! Plans a root file system that is assembled from layers, which are file systems in files: the mounts of containerd's
//! EROFS snapshotter, as containerd's mount manager leaves them to a runtime (containerd, `docs/mounts.md`).

use std::path::{Path, PathBuf};

use nutshell_protocol::{LayerPath, LayeredRoot, NewDirectory, RootMount};
use uuid::Uuid;

use super::{
    mount_rules::{
        GUEST_FILESYSTEMS, SNAPSHOTTER_REMEDY, guest_options, is_read_only, is_read_only_disk, unsupported_type,
    },
    template::{TemplateError, parse_path, parse_paths},
};
use crate::oci::{HostFiles, HostMount, HostOverlay, NewDiskFile, PlanError, Root, RootDisk, RootLayer};

/// The maximum number of files of a root file system. The descriptors of all of them go to the vmm in one packet.
pub(crate) const MAX_ROOT_FILES: usize = 240;

/// The permission bits of a directory whose option has none (containerd, `core/mount/manager/mkdir.go`).
const DEFAULT_DIRECTORY_MODE: u32 = 0o700;

/// The options of containerd's transformers start with these.
const NEW_DIRECTORY: &str = "X-containerd.mkdir.path=";
const NEW_FILE: &str = "X-containerd.mkfs.";

/// The type of a mount: a file system, and the transformers that containerd applies before it mounts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MountType<'m> {
    /// `format/`: its strings are templates.
    format: bool,
    /// `mkdir/`: directories are created before the mount.
    mkdir: bool,
    /// `mkfs/`: its file is created before the mount.
    mkfs: bool,
    filesystem: &'m str,
}

impl<'m> MountType<'m> {
    fn parse(kind: &'m str) -> Self {
        let mut parsed = Self {
            format: false,
            mkdir: false,
            mkfs: false,
            filesystem: kind,
        };
        while let Some((transformer, rest)) = parsed.filesystem.split_once('/') {
            match transformer {
                "format" => parsed.format = true,
                "mkdir" => parsed.mkdir = true,
                "mkfs" => parsed.mkfs = true,
                _ => break,
            }
            parsed.filesystem = rest;
        }
        parsed
    }

    fn is_layer(self) -> bool {
        GUEST_FILESYSTEMS.contains(&self.filesystem)
    }
}

/// Whether `mounts` describe a root that is assembled from layers.
pub(super) fn are_layers(mounts: &[HostMount]) -> bool {
    let kinds = || mounts.iter().map(|mount| MountType::parse(&mount.kind));
    let has_transformer = kinds().any(|kind| kind.format || kind.mkdir || kind.mkfs);
    let has_devices = mounts.iter().flat_map(|mount| &mount.options).any(is_device);
    has_transformer || has_devices || (mounts.len() > 1 && kinds().any(MountType::is_layer))
}

/// What the layers become.
enum Assembly {
    InGuest(LayeredRoot),
    /// An overlay whose upper directory is on the host.
    OnHost {
        lower: Vec<u32>,
        upper: String,
        work: String,
        options: Vec<String>,
    },
}

/// Plans the root from `mounts`: layers, of which the last is the root, or an overlay or a bind mount of them.
pub(super) fn plan_layers(mounts: &[HostMount]) -> Result<Root, PlanError> {
    let mut layers = Vec::new();
    let mut assembly = None;
    for mount in mounts {
        let kind = MountType::parse(&mount.kind);
        let is_last = layers.len() + 1 == mounts.len();
        if !mount.target.trim_matches('/').is_empty() {
            return Err(invalid(mount, "target", "a layer cannot be mounted below the root"));
        }
        match kind.filesystem {
            _ if kind.is_layer() && !kind.format && !kind.mkdir => layers.push(plan_layer(mount, kind)?),
            "overlay" if is_last && !kind.mkfs => assembly = Some(plan_overlay(mount, &layers)?),
            "bind" if is_last && !kind.mkfs => assembly = Some(Assembly::InGuest(plan_bind(mount, &layers)?)),
            _ => return Err(unsupported_type(mount)),
        }
    }
    let files: usize = layers.iter().map(|layer| 1 + layer.devices.len()).sum();
    if files > MAX_ROOT_FILES {
        let reason = format!("they consist of {files} files, and a root file system can have {MAX_ROOT_FILES}");
        return Err(PlanError::unsupported("rootfs mounts", reason));
    }
    match (assembly, layers.last()) {
        (Some(Assembly::InGuest(root)), _) => Ok(Root::Disk(RootDisk::Layers { layers, root })),
        (
            Some(Assembly::OnHost {
                lower,
                upper,
                work,
                options,
            }),
            _,
        ) => Ok(Root::Share {
            files: HostFiles::Overlay(HostOverlay {
                layers,
                lower,
                upper,
                work,
                options,
            }),
            read_only: false,
        }),
        (None, Some(last)) => {
            let mount = RootMount::Directory {
                path: LayerPath {
                    layer: u32::try_from(layers.len() - 1).unwrap_or(u32::MAX),
                    path: String::new(),
                },
                read_only: last.read_only,
            };
            let root = LayeredRoot {
                directories: Vec::new(),
                mount,
            };
            Ok(Root::Disk(RootDisk::Layers { layers, root }))
        }
        (None, None) => Err(PlanError::invalid("rootfs mounts", "there is no layer")),
    }
}

/// Plans a file system in a file.
fn plan_layer(mount: &HostMount, kind: MountType<'_>) -> Result<RootLayer, PlanError> {
    let absolute = |path: &str, what: &str| match Path::new(path).is_absolute() {
        true => Ok(PathBuf::from(path)),
        false => Err(invalid(mount, what, format!("{path:?} is not an absolute path"))),
    };
    let source = absolute(&mount.source, "source")?;
    let devices = mount.options.iter().filter_map(|option| option.strip_prefix("device="));
    let devices = devices
        .map(|path| absolute(path, "device"))
        .collect::<Result<Vec<_>, _>>()?;
    if !devices.is_empty() && kind.filesystem != "erofs" {
        return Err(invalid(mount, "device", "only EROFS has more devices"));
    }
    Ok(RootLayer {
        source,
        devices,
        filesystem: kind.filesystem.to_owned(),
        options: guest_options(mount, kind.filesystem),
        read_only: is_read_only_disk(mount, kind.filesystem),
        new_file: kind.mkfs.then(|| plan_new_file(mount, kind)).transpose()?,
    })
}

/// Plans the file that a mount of the type `mkfs/…` needs (containerd, `core/mount/manager/mkfs.go`).
fn plan_new_file(mount: &HostMount, kind: MountType<'_>) -> Result<NewDiskFile, PlanError> {
    let (mut size, mut uuid, mut filesystem) = (None, None, "ext4");
    for option in &mount.options {
        let Some((key, value)) = option.strip_prefix(NEW_FILE).and_then(|option| option.split_once('=')) else {
            continue;
        };
        match key {
            "size" => size = Some(parse_size(value).ok_or_else(|| invalid(mount, option, "not a size in bytes"))?),
            "uuid" => {
                let parsed = Uuid::try_parse(value).map_err(|error| invalid(mount, option, error.to_string()))?;
                uuid = Some(parsed);
            }
            "fs" => filesystem = value,
            _ => return Err(invalid(mount, option, "unknown")),
        }
    }
    if filesystem != kind.filesystem || !filesystem.starts_with("ext") {
        let reason = format!("a file of type {filesystem:?} cannot be made for this mount");
        return Err(invalid(mount, "X-containerd.mkfs.fs", reason));
    }
    let size = size.filter(|size| *size > 0);
    Ok(NewDiskFile {
        size: size.ok_or_else(|| invalid(mount, "X-containerd.mkfs.size", "missing or 0"))?,
        uuid,
    })
}

/// Parses a size as containerd does (go-units, `RAMInBytes`): a number of bytes, or of KiB, MiB, GiB or TiB with the
/// suffix `k`, `m`, `g` or `t`, of which a `b` or `ib` may follow.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|character: char| !character.is_ascii_digit());
    let unit = text[digits.len()..].trim_start().to_ascii_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Plans an overlay of layers.
fn plan_overlay(mount: &HostMount, layers: &[RootLayer]) -> Result<Assembly, PlanError> {
    let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    let (mut lower, mut upper, mut work) = (Vec::new(), None, None);
    let (mut directories, mut options) = (Vec::new(), Vec::new());
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => {
                lower = parse_paths(value, count).map_err(|error| template_error(mount, option, &error))?;
            }
            Some(("upperdir", value)) => upper = Some((option, value)),
            Some(("workdir", value)) => work = Some((option, value)),
            Some(("uidmap" | "gidmap", _)) => {
                let reason = "layers in files cannot map ids";
                return Err(PlanError::unsupported(field(mount, option), reason));
            }
            _ if option.starts_with(NEW_DIRECTORY) => directories.push(plan_directory(mount, option, layers)?),
            _ if option.starts_with("X-") => {}
            _ => options.push(option.clone()),
        }
    }
    if lower.is_empty() {
        return Err(invalid(mount, "lowerdir", "missing"));
    }
    let upper = match (upper, work) {
        (None, None) => None,
        (Some((_, upper)), Some((_, work))) if upper.starts_with('/') && work.starts_with('/') => {
            check_mountable_on_host(mount, layers, &lower)?;
            return Ok(Assembly::OnHost {
                lower: lower.into_iter().map(|path| path.layer).collect(),
                upper: upper.to_owned(),
                work: work.to_owned(),
                options,
            });
        }
        (Some((upper_option, upper)), Some((work_option, work))) => Some((
            writable_path(mount, upper_option, upper, layers)?,
            writable_path(mount, work_option, work, layers)?,
        )),
        _ => return Err(invalid(mount, "upperdir", "upperdir and workdir need each other")),
    };
    Ok(Assembly::InGuest(LayeredRoot {
        directories,
        mount: RootMount::Overlay { lower, upper, options },
    }))
}

/// Checks that no guest can have written the layers of an overlay on the host, and that no link in them is followed.
fn check_mountable_on_host(mount: &HostMount, layers: &[RootLayer], lower: &[LayerPath]) -> Result<(), PlanError> {
    if let Some(layer) = layers.iter().find(|layer| layer.filesystem != "erofs") {
        let reason = format!(
            "it is on the host, which does not mount the layer {}, because a guest may have written it",
            layer.source.display()
        );
        return Err(PlanError::unsupported(field(mount, "upperdir"), reason));
    }
    match lower.iter().all(|path| path.path.is_empty()) {
        true => Ok(()),
        false => Err(invalid(
            mount,
            "lowerdir",
            "only whole layers can be combined with an upperdir on the host",
        )),
    }
}

/// Plans a bind mount of a directory of a layer.
fn plan_bind(mount: &HostMount, layers: &[RootLayer]) -> Result<LayeredRoot, PlanError> {
    let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    let path = parse_path(&mount.source, count).map_err(|error| template_error(mount, "source", &error))?;
    let new = mount.options.iter().filter(|option| option.starts_with(NEW_DIRECTORY));
    let directories = new.map(|option| plan_directory(mount, option, layers));
    let read_only = is_read_only(mount) || is_in_read_only_layer(&path, layers);
    Ok(LayeredRoot {
        directories: directories.collect::<Result<_, _>>()?,
        mount: RootMount::Directory { path, read_only },
    })
}

/// Parses the option that creates a directory: its path, and then its mode, user and group, after colons.
fn plan_directory(mount: &HostMount, option: &str, layers: &[RootLayer]) -> Result<NewDirectory, PlanError> {
    let value = option.strip_prefix(NEW_DIRECTORY).unwrap_or_default();
    let parts: Vec<_> = value.split(':').collect();
    let number = |text: &str, radix| {
        let parsed = u32::from_str_radix(text, radix).ok();
        parsed.ok_or_else(|| invalid(mount, option, format!("{text:?} is not a number")))
    };
    let (path, mode, owner) = match parts[..] {
        [path] => (path, DEFAULT_DIRECTORY_MODE, (0, 0)),
        [path, mode] => (path, number(mode, 8)?, (0, 0)),
        [path, mode, uid, gid] => (path, number(mode, 8)?, (number(uid, 10)?, number(gid, 10)?)),
        _ => {
            return Err(invalid(
                mount,
                option,
                "it must be PATH, PATH:MODE or PATH:MODE:UID:GID",
            ));
        }
    };
    if mode > 0o777 {
        return Err(invalid(mount, option, "the mode has more than the permission bits"));
    }
    Ok(NewDirectory {
        path: writable_path(mount, option, path, layers)?,
        mode,
        owner,
    })
}

/// Parses a path that is in a writable layer.
fn writable_path(mount: &HostMount, option: &str, value: &str, layers: &[RootLayer]) -> Result<LayerPath, PlanError> {
    let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    let path = parse_path(value, count).map_err(|error| template_error(mount, option, &error))?;
    match is_in_read_only_layer(&path, layers) {
        false => Ok(path),
        true => Err(invalid(mount, option, "it is in a read-only layer")),
    }
}

fn is_in_read_only_layer(path: &LayerPath, layers: &[RootLayer]) -> bool {
    let layer = usize::try_from(path.layer).ok().and_then(|index| layers.get(index));
    layer.is_none_or(|layer| layer.read_only)
}

#[allow(clippy::ptr_arg, reason = "it is used as a predicate of the options")]
fn is_device(option: &String) -> bool {
    option.starts_with("device=")
}

fn template_error(mount: &HostMount, option: &str, error: &TemplateError) -> PlanError {
    match error {
        TemplateError::HostPath(_) => PlanError::unsupported(
            field(mount, option),
            format!(
                "{error}, and cannot be combined with layers on disks. {}",
                SNAPSHOTTER_REMEDY
            ),
        ),
        _ => invalid(mount, option, error.to_string()),
    }
}

fn invalid(mount: &HostMount, option: &str, reason: impl Into<String>) -> PlanError {
    PlanError::invalid(field(mount, option), reason)
}

fn field(mount: &HostMount, option: &str) -> String {
    format!("rootfs mount of type {:?}: {option}", mount.kind)
}

#[cfg(test)]
mod tests;
