//! Plans a root file system that is assembled from layers, which are file systems in files: the mounts of containerd's
//! EROFS snapshotter, as containerd's mount manager leaves them to a runtime (containerd, `docs/mounts.md`).

use std::path::{Path, PathBuf};

use nutshell_protocol::{LayerPath, NewDirectory};
use uuid::Uuid;

use super::{
    GUEST_FILESYSTEMS, is_read_only,
    template::{TemplateError, parse_path, parse_paths},
};
use crate::oci::{HostMount, LayersMount, NewDiskFile, PlanError, RootLayer, RootLayers, UpperDirectory};

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

/// Plans the root from `mounts`: layers, of which the last is the root, or an overlay or a bind mount of them.
pub(super) fn plan_layers(mounts: &[HostMount]) -> Result<RootLayers, PlanError> {
    let mut layers = Vec::new();
    let mut root = None;
    for mount in mounts {
        let kind = MountType::parse(&mount.kind);
        let is_last = layers.len() + 1 == mounts.len();
        if !mount.target.trim_matches('/').is_empty() {
            return Err(invalid(mount, "target", "a layer cannot be mounted below the root"));
        }
        match kind.filesystem {
            _ if kind.is_layer() && !kind.format && !kind.mkdir => layers.push(plan_layer(mount, kind)?),
            "overlay" if is_last && !kind.mkfs => root = Some(plan_overlay(mount, &layers)?),
            "bind" if is_last && !kind.mkfs => root = Some(plan_bind(mount, &layers)?),
            _ => return Err(super::unsupported_type(mount)),
        }
    }
    let files: usize = layers.iter().map(|layer| 1 + layer.devices.len()).sum();
    if files > MAX_ROOT_FILES {
        let reason = format!("they consist of {files} files, and a root file system can have {MAX_ROOT_FILES}");
        return Err(PlanError::unsupported("rootfs mounts", reason));
    }
    let (directories, mount) = match (root, layers.last()) {
        (Some(root), _) => root,
        (None, Some(last)) => {
            let path = LayerPath {
                layer: u32::try_from(layers.len() - 1).unwrap_or(u32::MAX),
                path: String::new(),
            };
            let read_only = last.read_only;
            (Vec::new(), LayersMount::Directory { path, read_only })
        }
        (None, None) => return Err(PlanError::invalid("rootfs mounts", "there is no layer")),
    };
    Ok(RootLayers {
        layers,
        directories,
        mount,
    })
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
        options: super::guest_options(mount, kind.filesystem),
        read_only: super::is_read_only_disk(mount, kind.filesystem),
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

/// Plans an overlay of layers, and the directories to create before it is mounted.
fn plan_overlay(mount: &HostMount, layers: &[RootLayer]) -> Result<(Vec<NewDirectory>, LayersMount), PlanError> {
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
            Some(UpperDirectory::OnHost {
                upper: upper.to_owned(),
                work: work.to_owned(),
            })
        }
        (Some((upper_option, upper)), Some((work_option, work))) => Some(UpperDirectory::InLayer {
            upper: writable_path(mount, upper_option, upper, layers)?,
            work: writable_path(mount, work_option, work, layers)?,
        }),
        _ => return Err(invalid(mount, "upperdir", "upperdir and workdir need each other")),
    };
    Ok((directories, LayersMount::Overlay { lower, upper, options }))
}

/// Plans a bind mount of a directory of a layer, and the directories to create before it is made.
fn plan_bind(mount: &HostMount, layers: &[RootLayer]) -> Result<(Vec<NewDirectory>, LayersMount), PlanError> {
    let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    let path = parse_path(&mount.source, count).map_err(|error| template_error(mount, "source", &error))?;
    let new = mount.options.iter().filter(|option| option.starts_with(NEW_DIRECTORY));
    let directories = new.map(|option| plan_directory(mount, option, layers));
    let read_only = is_read_only(mount) || is_in_read_only_layer(&path, layers);
    Ok((
        directories.collect::<Result<_, _>>()?,
        LayersMount::Directory { path, read_only },
    ))
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
                super::SNAPSHOTTER_REMEDY
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
mod tests {
    use super::{super::tests::mount, *};

    fn layer(filesystem: &str, source: &str, read_only: bool) -> RootLayer {
        RootLayer {
            source: source.into(),
            devices: Vec::new(),
            filesystem: filesystem.to_owned(),
            options: if read_only { vec!["ro".to_owned()] } else { Vec::new() },
            read_only,
            new_file: None,
        }
    }

    fn at(layer: u32, path: &str) -> LayerPath {
        LayerPath {
            layer,
            path: path.to_owned(),
        }
    }

    /// The mounts of an active snapshot with two layers below it, in the block mode of the snapshotter.
    fn block_mode() -> Vec<HostMount> {
        vec![
            mount(
                "mkfs/ext4",
                "/s/9/rwlayer.img",
                &[
                    "X-containerd.mkfs.fs=ext4",
                    "X-containerd.mkfs.size=67108864",
                    "rw",
                    "loop",
                ],
            ),
            mount("erofs", "/s/2/layer.erofs", &["ro", "loop"]),
            mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0700:5:6",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                    "index=off",
                ],
            ),
        ]
    }

    #[test]
    fn writable_disk_with_an_overlay_of_erofs_layers() {
        let mounts = block_mode();
        assert!(are_layers(&mounts));

        let planned = plan_layers(&mounts).unwrap();

        let writable = RootLayer {
            new_file: Some(NewDiskFile {
                size: 64 << 20,
                uuid: None,
            }),
            ..layer("ext4", "/s/9/rwlayer.img", false)
        };
        let directory = |path, mode, owner| NewDirectory {
            path: at(0, path),
            mode,
            owner,
        };
        let expected = RootLayers {
            layers: vec![
                writable,
                layer("erofs", "/s/2/layer.erofs", true),
                layer("erofs", "/s/1/layer.erofs", true),
            ],
            directories: vec![directory("upper", 0o755, (0, 0)), directory("work", 0o700, (5, 6))],
            mount: LayersMount::Overlay {
                lower: vec![at(1, ""), at(2, "")],
                upper: Some(UpperDirectory::InLayer {
                    upper: at(0, "upper"),
                    work: at(0, "work"),
                }),
                options: vec!["index=off".to_owned()],
            },
        };
        assert_eq!(planned, expected);
        assert!(planned.guest_root().is_some());
    }

    #[test]
    fn merged_metadata_has_its_layers_as_devices() {
        let options = ["ro", "loop", "device=/s/1/layer.erofs", "device=/s/2/layer.erofs"];
        let mounts = [mount("erofs", "/s/2/fsmeta.erofs", &options)];
        assert!(are_layers(&mounts));

        let planned = plan_layers(&mounts).unwrap();

        let merged = RootLayer {
            devices: vec!["/s/1/layer.erofs".into(), "/s/2/layer.erofs".into()],
            ..layer("erofs", "/s/2/fsmeta.erofs", true)
        };
        let expected = RootLayers {
            layers: vec![merged],
            directories: Vec::new(),
            mount: LayersMount::Directory {
                path: at(0, ""),
                read_only: true,
            },
        };
        assert_eq!(planned, expected);
    }

    #[test]
    fn root_is_a_directory_of_a_layer_or_the_last_layer() {
        let ext4 = mount("ext4", "/s/9/rwlayer.img", &["rw", "loop"]);
        let erofs = mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]);
        let created = "X-containerd.mkdir.path={{ mount 0 }}/upper";
        for (mounts, path, read_only) in [
            (
                vec![
                    ext4.clone(),
                    mount("format/mkdir/bind", "{{ mount 0 }}/upper", &[created, "rbind"]),
                ],
                at(0, "upper"),
                false,
            ),
            (
                vec![ext4.clone(), mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])],
                at(0, ""),
                true,
            ),
            (
                vec![erofs.clone(), mount("format/bind", "{{ mount 0 }}", &["rbind"])],
                at(0, ""),
                true,
            ),
            (vec![erofs.clone(), ext4.clone()], at(1, ""), false),
        ] {
            assert!(are_layers(&mounts), "{mounts:?}");
            let planned = plan_layers(&mounts).unwrap();
            assert_eq!(planned.mount, LayersMount::Directory { path, read_only }, "{mounts:?}");
        }
    }

    #[test]
    fn upper_directory_can_be_absent_or_on_the_host() {
        let lower = "lowerdir={{ mount 0 }}:{{ mount 1 }}";
        let on_host = UpperDirectory::OnHost {
            upper: "/s/9/fs".to_owned(),
            work: "/s/9/work".to_owned(),
        };
        for (options, expected) in [
            (vec![lower], None),
            (vec!["workdir=/s/9/work", "upperdir=/s/9/fs", lower], Some(on_host)),
        ] {
            let mounts = [
                mount("erofs", "/s/2/layer.erofs", &["loop"]),
                mount("erofs", "/s/1/layer.erofs", &["loop"]),
                mount("format/overlay", "overlay", &options),
            ];

            let planned = plan_layers(&mounts).unwrap();

            assert_eq!(planned.guest_root().is_some(), expected.is_none());
            let LayersMount::Overlay { upper, .. } = planned.mount else {
                panic!("{:?}", planned.mount);
            };
            assert_eq!(upper, expected);
        }
    }

    #[test]
    fn sizes_have_the_units_of_containerd() {
        for (text, expected) in [
            ("1024", Some(1024)),
            ("64m", Some(64 << 20)),
            ("1 GiB", Some(1 << 30)),
            ("2KB", Some(2048)),
            ("3T", Some(3 << 40)),
            ("", None),
            ("m", None),
            ("-1", None),
            ("1x", None),
            ("99999999999999t", None),
        ] {
            assert_eq!(parse_size(text), expected, "{text}");
        }
    }

    #[test]
    fn wrong_mounts_are_refused_with_type_and_option() {
        let replaced = |index: usize, mount: HostMount| {
            let mut mounts = block_mode();
            mounts[index] = mount;
            mounts
        };
        let overlay = |options: &[&str]| replaced(3, mount("format/mkdir/overlay", "overlay", options));
        let new_file = |options: &[&str]| replaced(0, mount("mkfs/ext4", "/s/9/rwlayer.img", options));
        let many: Vec<_> = (0..=MAX_ROOT_FILES)
            .map(|number| mount("erofs", &format!("/s/{number}"), &[]))
            .collect();
        let below = HostMount {
            target: "/etc".to_owned(),
            ..mount("erofs", "/s/1", &[])
        };
        for (mounts, expected) in [
            (overlay(&["index=off"]), "\"format/mkdir/overlay\": lowerdir: missing"),
            (overlay(&["lowerdir={{ mount 3 }}"]), "it names mount 3"),
            (
                overlay(&["lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/upper"]),
                "need each other",
            ),
            (
                overlay(&[
                    "lowerdir={{ mount 1 }}",
                    "upperdir={{ mount 2 }}/upper",
                    "workdir={{ mount 0 }}/w",
                ]),
                "it is in a read-only layer",
            ),
            (
                overlay(&["lowerdir={{ mount 1 }}", "upperdir=/s/9/fs", "workdir={{ mount 0 }}/w"]),
                "\"/s/9/fs\" is a path of the host",
            ),
            (
                overlay(&["lowerdir={{ mount 1 }}", "uidmap=0:1000:1"]),
                "cannot map ids",
            ),
            (
                overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:0999"]),
                "\"0999\" is not a number",
            ),
            (
                overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:4755"]),
                "more than the permission bits",
            ),
            (
                overlay(&["X-containerd.mkdir.path={{ mount 0 }}/a:0755:1"]),
                "it must be PATH",
            ),
            (
                overlay(&["X-containerd.mkdir.path={{ mount 1 }}/a"]),
                "it is in a read-only layer",
            ),
            (new_file(&[]), "X-containerd.mkfs.size: missing or 0"),
            (new_file(&["X-containerd.mkfs.size=many"]), "not a size in bytes"),
            (
                new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.fs=xfs"]),
                "\"xfs\" cannot be made",
            ),
            (
                new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.uuid=1"]),
                "X-containerd.mkfs.uuid=1",
            ),
            (
                new_file(&["X-containerd.mkfs.size=1m", "X-containerd.mkfs.color=1"]),
                "unknown",
            ),
            (
                replaced(1, mount("erofs", "layer.erofs", &[])),
                "\"layer.erofs\" is not an absolute path",
            ),
            (
                replaced(1, mount("erofs", "/s/2", &["device=2"])),
                "\"2\" is not an absolute path",
            ),
            (
                replaced(1, mount("ext4", "/s/2", &["device=/2"])),
                "only EROFS has more devices",
            ),
            (
                replaced(1, mount("format/erofs", "{{ source 0 }}", &[])),
                "\"format/erofs\": not supported",
            ),
            (
                replaced(1, mount("overlay", "overlay", &[])),
                "\"overlay\": not supported",
            ),
            (
                replaced(1, mount("mkfs/xfs", "/s/2", &[])),
                "\"mkfs/xfs\": not supported",
            ),
            (
                replaced(1, mount("other/erofs", "/s/2", &[])),
                "\"other/erofs\": not supported",
            ),
            (replaced(1, below), "a layer cannot be mounted below the root"),
            (vec![mount("format/bind", "{{ mount 0 }}", &[])], "it names mount 0"),
            (many, "241 files"),
        ] {
            let error = plan_layers(&mounts).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
