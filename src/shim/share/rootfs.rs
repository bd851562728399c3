//! The snapshotter's mounts, made where nobody sees them.

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

use super::{ShareError, attach_error, clone_tree, idmap};
use crate::{
    jail::{step, syscalls::mount_setattr},
    oci::{HostMount, IdMap},
};

/// What the kernel takes of a mount's options, its end included (mount(2): one page).
const OPTIONS_SIZE: usize = 4096;

/// Makes `mounts` in their order at `place` and returns them as one detached tree. The calling thread
/// is in a mount namespace of its own afterwards.
pub(super) fn mount_detached(mounts: &[HostMount], place: &Path) -> Result<OwnedFd, ShareError> {
    let own_namespace = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        Ok(mount_change(
            "/",
            MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
        )?)
    };
    let failed = attach_error(place, "a root file system");
    own_namespace().map_err(step("unshare mounts")).map_err(&failed)?;
    for mount in mounts {
        make(mount, place).map_err(|source| ShareError::Rootfs {
            kind: mount.kind.clone(),
            from: mount.source.clone(),
            at: place.join(mount.target.trim_start_matches('/')).display().to_string(),
            options: mount.options.clone(),
            source,
        })?;
    }
    clone_tree(place, true)
        .map_err(step("detach the mounts"))
        .map_err(&failed)
}

fn make(what: &HostMount, place: &Path) -> io::Result<()> {
    let descriptor = open_target(place, &what.target)?;
    let target = format!("/proc/thread-self/fd/{}", descriptor.as_raw_fd());
    let mut options = Options::parse(&what.options);
    match (what.kind.as_str(), options.take_ids()?) {
        (_, None) => {}
        ("overlay", Some(map)) => options.map_layers(&map, &target)?,
        (_, Some(map)) => {
            let tree = clone_tree(Path::new(&what.source), options.bind != Some(Bind::Single))?;
            idmap::apply(tree.as_fd(), &map, false).map_err(cannot_map(&what.source))?;
            attach(&tree, Path::new(&target))?;
            return restrict(&options, place, &what.target);
        }
    }
    match (what.kind.as_str(), options.bind) {
        ("bind", None) | (_, Some(Bind::Single)) => mount_bind(&what.source, &target)?,
        (_, Some(Bind::Recursive)) => mount_bind_recursive(&what.source, &target)?,
        (kind, None) => {
            let data = options.data(kind)?;
            return Ok(mount(&what.source, &target, kind, options.flags, data.as_c_str())?);
        }
    }
    restrict(&options, place, &what.target)
}

/// A bind mount's `ro`, which mount(2) ignores at first.
fn restrict(options: &Options, place: &Path, target: &str) -> io::Result<()> {
    if options.flags.contains(MountFlags::RDONLY) {
        // The descriptor means what lies under the new mount; the path means the mount.
        let mounted = open_target(place, target)?;
        mount_setattr(
            mounted.as_fd(),
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            MountPropagationFlags::empty(),
            false,
        )?;
    }
    Ok(())
}

fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(rustix::mount::move_mount(tree, "", CWD, target, flags)?)
}

/// The kernel's own words are "invalid argument".
fn cannot_map(what: &str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {}: {error}", idmap::STEP))
}

/// Opens `target` of what was mounted at `place` before. A guest may have written that, so it is
/// resolved as if it were the root.
fn open_target(place: &Path, target: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let place = rustix::fs::openat(CWD, place, flags | OFlags::DIRECTORY, Mode::empty())?;
    match target.trim_start_matches('/') {
        "" => Ok(place),
        target => Ok(rustix::fs::openat2(
            &place,
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

/// Mount options as fstab has them, told apart (mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS").
#[derive(Debug, PartialEq, Eq)]
struct Options {
    bind: Option<Bind>,
    flags: MountFlags,
    data: Vec<String>,
}

impl Options {
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

    /// What the file system itself is told.
    fn data(&self, kind: &str) -> io::Result<CString> {
        let data = self.data.join(",");
        let data = if kind == "overlay" && data.len() >= OPTIONS_SIZE {
            self.relative_layers()?
        } else {
            data
        };
        if data.len() >= OPTIONS_SIZE {
            return Err(io::Error::other(
                "the mount's options are longer than a page: too many layers",
            ));
        }
        Ok(CString::new(data)?)
    }

    /// Takes the mapping of ids out, which is no file system's option.
    fn take_ids(&mut self) -> io::Result<Option<IdMap>> {
        let map = IdMap::from_options(&self.data).map_err(io::Error::other)?;
        self.data
            .retain(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="));
        Ok(map)
    }

    /// Has the lower layers' ids mapped: each layer is mounted anew, at a place in a small tmpfs that
    /// is mounted at `target` and hidden by the overlay itself afterwards. The upper directory is the
    /// container's own, and is as the snapshotter has made it.
    fn map_layers(&mut self, map: &IdMap, target: &str) -> io::Result<()> {
        const KEY: &str = "lowerdir=";
        mount("tmpfs", target, "tmpfs", MountFlags::empty(), c"mode=755,size=64k")?;
        // The descriptor behind `target` means what lies under the tmpfs; its path means the tmpfs.
        let places = std::fs::read_link(target)?;
        for option in &mut self.data {
            let Some(layers) = option.strip_prefix(KEY) else {
                continue;
            };
            let mut mapped = Vec::new();
            for (number, layer) in split_layers(layers).enumerate() {
                // As the overlay's own parser does.
                let layer = layer.replace("\\:", ":").replace("\\\\", "\\");
                let tree = clone_tree(Path::new(&layer), false)?;
                idmap::apply(tree.as_fd(), map, false).map_err(cannot_map(&layer))?;
                let place = places.join(number.to_string());
                std::fs::create_dir(&place)?;
                attach(&tree, &place)?;
                mapped.push(escape(&place)?);
            }
            *option = format!("{KEY}{}", mapped.join(":"));
        }
        Ok(())
    }

    /// The options with each lower layer named from the directory that they all lie in, which
    /// becomes the calling thread's.
    fn relative_layers(&self) -> io::Result<String> {
        const KEY: &str = "lowerdir=";
        let mut options = self.data.clone();
        for option in &mut options {
            let Some(layers) = option.strip_prefix(KEY) else {
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
            *option = format!("{KEY}{relative}");
        }
        Ok(options.join(","))
    }
}

/// A path as the options of an overlay have it.
fn escape(path: &Path) -> io::Result<String> {
    let text = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,"))
}

/// The layers of a `lowerdir`, which colons part that no backslash protects.
fn split_layers(layers: &str) -> impl Iterator<Item = &str> {
    let mut protected = false;
    layers.split(move |character| {
        let parts = character == ':' && !protected;
        protected = character == '\\' && !protected;
        parts
    })
}

/// The deepest directory that all `layers` lie in, and that has no protected character in its path:
/// a backslash protects in an option, not in a path.
fn common_directory<'a>(layers: &[&'a Path]) -> &'a Path {
    let holds_all = |directory: &Path| {
        !directory.as_os_str().as_bytes().contains(&b'\\')
            && layers
                .iter()
                .all(|layer| layer.starts_with(directory) && *layer != directory)
    };
    layers
        .first()
        .and_then(|layer| layer.ancestors().skip(1).find(|directory| holds_all(directory)))
        .unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(options: &[&str]) -> Vec<String> {
        options.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_are_told_apart() {
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
            let expected = Options {
                bind,
                flags,
                data: owned(&data),
            };
            assert_eq!(Options::parse(&owned(&options)), expected, "{options:?}");
        }
    }

    #[test]
    fn layers_are_parted_at_unprotected_colons() {
        for (layers, expected) in [
            ("/a", vec!["/a"]),
            ("/a:/b", vec!["/a", "/b"]),
            (r"/a\:b:/c\\:/d", vec![r"/a\:b", r"/c\\", "/d"]),
        ] {
            assert_eq!(split_layers(layers).collect::<Vec<_>>(), expected, "{layers}");
        }
    }

    #[test]
    fn common_directory_is_the_deepest_that_holds_all_layers() {
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
