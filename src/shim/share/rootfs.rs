//! Makes the mounts of a snapshotter in a private mount namespace.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::sched::{CloneFlags, unshare};
use nutshell_linux::mount_options;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{
        MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, mount, mount_bind, mount_bind_recursive,
        mount_change,
    },
};

use super::{
    detached::clone_mount,
    error::{ShareError, attach_error},
    idmap,
};
use crate::{
    jail::{step, syscalls::mount_setattr},
    oci::{HostMount, IdMap},
};

/// The size of the kernel's buffer for mount options in bytes, with the terminating zero (mount(2): one page).
const MOUNT_DATA_SIZE: usize = 4096;

/// An overlay's option for its lower layers, topmost first (kernel, `Documentation/filesystems/overlayfs.rst`).
const LOWERDIR: &str = "lowerdir=";

/// Makes `mounts` in order at `rootfs` and returns them as one detached tree. Leaves the calling thread in a new mount
/// namespace.
pub(super) fn mount_detached(mounts: &[HostMount], rootfs: &Path) -> Result<OwnedFd, ShareError> {
    let failed = attach_error(rootfs, "a root file system");
    enter_private_namespace()
        .map_err(step("unshare mounts"))
        .map_err(&failed)?;
    for mount in mounts {
        make_mount(mount, rootfs).map_err(|source| ShareError::Rootfs {
            kind: mount.kind.clone(),
            from: mount.source.clone(),
            at: rootfs.join(mount.target.trim_start_matches('/')).display().to_string(),
            options: mount.options.clone(),
            source,
        })?;
    }
    clone_mount(rootfs, true)
        .map_err(step("detach the mounts"))
        .map_err(&failed)
}

/// Moves the calling thread into a new mount namespace, whose mounts propagate to no other.
pub(super) fn enter_private_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?)
}

/// Makes `mount` at its target, a path relative to `rootfs`.
pub(super) fn make_mount(mount: &HostMount, rootfs: &Path) -> io::Result<()> {
    let descriptor = open_target(rootfs, &mount.target)?;
    let target = format!("/proc/thread-self/fd/{}", descriptor.as_raw_fd());
    let mut options = MountOptions::parse(&mount.options);
    match (mount.kind.as_str(), options.take_id_map()?) {
        (_, None) => {}
        ("overlay", Some(map)) => options.map_lower_layers(&map, &target)?,
        (_, Some(map)) => {
            let tree = clone_mount(Path::new(&mount.source), options.bind != Some(Bind::Single))?;
            idmap::apply(tree.as_fd(), &map, false).map_err(id_map_error(&mount.source))?;
            move_detached(&tree, Path::new(&target))?;
            return apply_read_only(&options, rootfs, &mount.target);
        }
    }
    match (mount.kind.as_str(), options.bind) {
        ("bind", None) | (_, Some(Bind::Single)) => mount_bind(&mount.source, &target)?,
        (_, Some(Bind::Recursive)) => mount_bind_recursive(&mount.source, &target)?,
        (kind, None) => {
            let data = options.data(kind)?;
            return Ok(rustix::mount::mount(
                &mount.source,
                &target,
                kind,
                options.flags,
                data.as_c_str(),
            )?);
        }
    }
    apply_read_only(&options, rootfs, &mount.target)
}

/// Makes a new bind mount read-only if it has the option `ro`: mount(2) ignores that when it creates one.
fn apply_read_only(options: &MountOptions, rootfs: &Path, target: &str) -> io::Result<()> {
    if options.flags.contains(MountFlags::RDONLY) {
        // Opened again: the earlier descriptor refers to the directory below the new mount, the path to the mount.
        let mounted = open_target(rootfs, target)?;
        mount_setattr(
            mounted.as_fd(),
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            MountPropagationFlags::empty(),
            false,
        )?;
    }
    Ok(())
}

fn move_detached(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(rustix::mount::move_mount(tree, "", CWD, target, flags)?)
}

/// Adds the source and [`idmap::ID_MAP_STEP`] to an error.
fn id_map_error(source: &str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{source}: {}: {error}", idmap::ID_MAP_STEP))
}

/// Opens `target` in the file system that is mounted at `rootfs`. A guest may have written it, so the path is resolved
/// as if `rootfs` were the root directory.
fn open_target(rootfs: &Path, target: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let rootfs = rustix::fs::openat(CWD, rootfs, flags | OFlags::DIRECTORY, Mode::empty())?;
    match target.trim_start_matches('/') {
        "" => Ok(rootfs),
        target => Ok(rustix::fs::openat2(
            &rootfs,
            target,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )?),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bind {
    Single,
    Recursive,
}

/// Mount options in fstab notation, sorted by their kind (mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS").
#[derive(Debug, PartialEq, Eq)]
struct MountOptions {
    bind: Option<Bind>,
    flags: MountFlags,
    /// The options of the file system.
    data: Vec<String>,
}

impl MountOptions {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            bind: None,
            flags: MountFlags::empty(),
            data: Vec::new(),
        };
        for option in options {
            match option.as_str() {
                "bind" => parsed.bind = Some(Bind::Single),
                "rbind" => parsed.bind = Some(Bind::Recursive),
                name => {
                    if !mount_options::apply(name, &mut parsed.flags) {
                        parsed.data.push(name.to_owned());
                    }
                }
            }
        }
        parsed
    }

    /// The options of the file system, as the kernel takes them. May change the thread's working directory (see
    /// [`Self::relative_layers`]).
    fn data(&self, kind: &str) -> io::Result<CString> {
        let data = self.data.join(",");
        let data = if kind == "overlay" && data.len() >= MOUNT_DATA_SIZE {
            self.relative_layers()?
        } else {
            data
        };
        if data.len() >= MOUNT_DATA_SIZE {
            return Err(io::Error::other(
                "the mount's options are longer than a page: too many layers",
            ));
        }
        Ok(CString::new(data)?)
    }

    /// Removes the id mapping from the file system's options, and returns it. It is an option of the mount.
    fn take_id_map(&mut self) -> io::Result<Option<IdMap>> {
        let map = IdMap::from_options(&self.data).map_err(io::Error::other)?;
        self.data
            .retain(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="));
        Ok(map)
    }

    /// Replaces the lower layers of an overlay with id-mapped ones. Each layer is mounted again, in a small tmpfs that
    /// is mounted at `target`; the overlay covers it afterwards. The upper directory belongs only to the container and
    /// stays as the snapshotter made it.
    fn map_lower_layers(&mut self, map: &IdMap, target: &str) -> io::Result<()> {
        mount("tmpfs", target, "tmpfs", MountFlags::empty(), c"mode=755,size=64k")?;
        // The descriptor behind `target` refers to the directory below the tmpfs, its path to the tmpfs.
        let tmpfs = std::fs::read_link(target)?;
        for option in &mut self.data {
            let Some(layers) = option.strip_prefix(LOWERDIR) else {
                continue;
            };
            let mut mapped = Vec::new();
            for (number, layer) in split_layers(layers).enumerate() {
                // Unescaped as by the overlay's own parser.
                let layer = layer.replace("\\:", ":").replace("\\\\", "\\");
                let tree = clone_mount(Path::new(&layer), false)?;
                idmap::apply(tree.as_fd(), map, false).map_err(id_map_error(&layer))?;
                let mount_point = tmpfs.join(number.to_string());
                std::fs::create_dir(&mount_point)?;
                move_detached(&tree, &mount_point)?;
                mapped.push(escape_layer(&mount_point)?);
            }
            *option = format!("{LOWERDIR}{}", mapped.join(":"));
        }
        Ok(())
    }

    /// The options with lower layers that are relative to the deepest directory that contains all of them, which makes
    /// them shorter. Changes the calling thread's working directory to it.
    fn relative_layers(&self) -> io::Result<String> {
        let mut options = self.data.clone();
        for option in &mut options {
            let Some(layers) = option.strip_prefix(LOWERDIR) else {
                continue;
            };
            let layers: Vec<_> = split_layers(layers).map(Path::new).collect();
            let common = common_directory(&layers);
            let relative: Option<Vec<_>> = layers
                .iter()
                .map(|layer| layer.strip_prefix(common).ok()?.to_str())
                .collect();
            let relative = relative.ok_or(io::ErrorKind::InvalidInput)?.join(":");
            rustix::process::chdir(common)?;
            *option = format!("{LOWERDIR}{relative}");
        }
        Ok(options.join(","))
    }
}

/// Escapes a path for the options of an overlay.
pub(super) fn escape_layer(path: &Path) -> io::Result<String> {
    let text = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,"))
}

/// Splits a `lowerdir` at the colons that are not escaped by a backslash. The layers stay escaped.
fn split_layers(layers: &str) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    layers.split(move |character| {
        let splits = character == ':' && !escaped;
        escaped = character == '\\' && !escaped;
        splits
    })
}

/// The deepest directory that contains all `layers` and has no backslash in its path. A backslash is an escape in an
/// option, but not in a path.
fn common_directory<'a>(layers: &[&'a Path]) -> &'a Path {
    let contains_all = |directory: &Path| {
        !directory.as_os_str().as_bytes().contains(&b'\\')
            && layers
                .iter()
                .all(|layer| layer.starts_with(directory) && *layer != directory)
    };
    layers
        .first()
        .and_then(|layer| layer.ancestors().skip(1).find(|directory| contains_all(directory)))
        .unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(options: &[&str]) -> Vec<String> {
        options.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_are_sorted_into_bind_flags_and_data() {
        for (options, expected) in [
            (vec![], (None, MountFlags::empty(), vec![])),
            (vec!["rbind", "ro"], (Some(Bind::Recursive), MountFlags::RDONLY, vec![])),
            (
                vec!["bind", "ro", "rw"],
                (Some(Bind::Single), MountFlags::empty(), vec![]),
            ),
            (
                vec!["nodev", "lowerdir=/a:/b", "index=off", "noatime"],
                (
                    None,
                    MountFlags::NODEV | MountFlags::NOATIME,
                    vec!["lowerdir=/a:/b", "index=off"],
                ),
            ),
        ] {
            let (bind, flags, data) = expected;
            let expected = MountOptions {
                bind,
                flags,
                data: owned(&data),
            };
            assert_eq!(MountOptions::parse(&owned(&options)), expected, "{options:?}");
        }
    }

    #[test]
    fn lowerdir_is_split_at_unescaped_colons() {
        for (layers, expected) in [
            ("/a", vec!["/a"]),
            ("/a:/b", vec!["/a", "/b"]),
            (r"/a\:b:/c\\:/d", vec![r"/a\:b", r"/c\\", "/d"]),
        ] {
            assert_eq!(split_layers(layers).collect::<Vec<_>>(), expected, "{layers}");
        }
    }

    #[test]
    fn common_directory_is_the_deepest_that_contains_all_layers() {
        for (layers, expected) in [
            (vec!["/s/1/fs", "/s/2/fs"], "/s"),
            (vec!["/s/1/fs", "/s/1/fs2"], "/s/1"),
            (vec!["/s/1/fs"], "/s/1"),
            (vec!["/s/a", "/s/a/b"], "/s"),
            (vec![r"/s\:t/1/fs", r"/s\:t/2/fs"], "/"),
            (vec!["/a", "/b"], "/"),
        ] {
            let paths: Vec<_> = layers.iter().map(Path::new).collect();
            assert_eq!(common_directory(&paths), Path::new(expected), "{layers:?}");
        }
    }
}
