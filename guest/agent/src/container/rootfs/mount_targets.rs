//! Adapts the mounts of a spec to the files of the image, as runc does: symbolic links in mount points are resolved
//! inside the root file system, and a tmpfs gets the mode of the directory that it covers.
//!
//! libcontainer creates missing mount points, but not through a symbolic link that leads nowhere, such as the
//! `/etc/localtime` of some images. It never leaves the root file system, whatever this module returns.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How many symbolic links a path may contain, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Adapts `mounts`, which are made in this order below `rootfs`.
pub(crate) fn adapt_mounts(rootfs: &Path, mounts: &mut [Mount]) -> io::Result<()> {
    let root = rustix::fs::open(
        rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut earlier: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        // These stay at the paths in the spec, whatever links the image has: masked paths, for example, are below
        // these paths.
        if matches!(mount.typ().as_deref(), Some("proc" | "sysfs")) {
            earlier.push(mount.destination().clone());
            continue;
        }
        let target = resolve(&root, mount.destination(), &earlier)?;
        // The file system of an earlier mount is not visible yet.
        if !earlier.iter().any(|earlier| target.starts_with(earlier)) && mount.typ().as_deref() == Some("tmpfs") {
            inherit_mode(&root, &target, mount);
        }
        mount.set_destination(target.clone());
        if target != Path::new("/") {
            earlier.push(target);
        }
    }
    Ok(())
}

/// Resolves the symbolic links of `path` as if `root` were the root directory. Missing parts are taken literally, and
/// so is everything below one of the `earlier` mount points.
fn resolve(root: &OwnedFd, path: &Path, earlier: &[PathBuf]) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::from("/");
    let mut rest: VecDeque<OsString> = names(path).collect();
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        let is_hidden = earlier.iter().any(|earlier| resolved.starts_with(earlier));
        let Some(target) = (if is_hidden {
            None
        } else {
            read_link(root, &resolved, &name)?
        }) else {
            resolved.push(name);
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        if target.is_absolute() {
            resolved = PathBuf::from("/");
        }
        for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
            rest.push_front(name);
        }
    }
    Ok(resolved)
}

/// The components of a path that are names or `..`.
fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

/// The target of the symbolic link `name` in `directory`. `None` if it is no link, or does not exist.
fn read_link(root: &OwnedFd, directory: &Path, name: &OsString) -> io::Result<Option<PathBuf>> {
    let opened = match open(root, directory) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        opened => opened?,
    };
    match rustix::fs::readlinkat(&opened, name.as_os_str(), Vec::new()) {
        Ok(target) => Ok(Some(PathBuf::from(OsString::from_vec(target.into_bytes())))),
        Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn open(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Gives a tmpfs without the option `mode` the mode of the directory that it covers, if there is one.
fn inherit_mode(root: &OwnedFd, target: &Path, mount: &mut Mount) {
    let mut options = mount.options().clone().unwrap_or_default();
    if options.iter().any(|option| option.starts_with("mode=")) {
        return;
    }
    // A directory that is missing, or cannot be opened, gets the default mode of a tmpfs.
    if let Ok(status) = open(root, target).and_then(rustix::fs::fstat) {
        options.push(format!("mode={:o}", status.st_mode & 0o7777));
        mount.set_options(Some(options));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A root file system with links, below a directory that no mount point may reach.
    fn rootfs(name: &str) -> PathBuf {
        let outside = std::env::temp_dir().join(format!("agent-mounts-{name}-{}", std::process::id()));
        let rootfs = outside.join("rootfs");
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        fs::create_dir_all(rootfs.join("real/dir")).unwrap();
        symlink("/usr/share/zoneinfo/UTC", rootfs.join("etc/localtime")).unwrap();
        symlink("/real", rootfs.join("absolute")).unwrap();
        symlink("../../../..", rootfs.join("up")).unwrap();
        symlink("loop", rootfs.join("loop")).unwrap();
        rootfs
    }

    fn mount(kind: &str, destination: &str, options: &[&str]) -> Mount {
        let mount = serde_json::json!({"type": kind, "destination": destination, "options": options});
        serde_json::from_value(mount).unwrap()
    }

    #[test]
    fn links_in_mount_points_are_resolved_inside_the_root() {
        let rootfs = rootfs("links");
        for (destination, expected) in [
            ("/etc/localtime", "/usr/share/zoneinfo/UTC"),
            ("/absolute/dir/new", "/real/dir/new"),
            ("/up/x", "/x"),
            ("/a/../b", "/b"),
            ("relative", "/relative"),
            ("/", "/"),
        ] {
            let mut mounts = [mount("bind", destination, &[])];
            adapt_mounts(&rootfs, &mut mounts).unwrap();
            assert_eq!(mounts[0].destination(), Path::new(expected), "{destination}");
        }
        let error = adapt_mounts(&rootfs, &mut [mount("bind", "/loop/x", &[])]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        fs::remove_dir_all(rootfs.parent().unwrap()).unwrap();
    }

    #[test]
    fn links_do_not_move_proc_and_sysfs() {
        let rootfs = rootfs("kernel");
        let mut mounts = [mount("proc", "/absolute", &[]), mount("sysfs", "/etc/localtime", &[])];
        adapt_mounts(&rootfs, &mut mounts).unwrap();
        assert_eq!(mounts[0].destination(), Path::new("/absolute"));
        assert_eq!(mounts[1].destination(), Path::new("/etc/localtime"));
        fs::remove_dir_all(rootfs.parent().unwrap()).unwrap();
    }

    #[test]
    fn links_below_an_earlier_mount_are_not_resolved() {
        let rootfs = rootfs("earlier");
        let mut mounts = [mount("bind", "/etc", &[]), mount("bind", "/etc/localtime", &[])];
        adapt_mounts(&rootfs, &mut mounts).unwrap();
        assert_eq!(mounts[1].destination(), Path::new("/etc/localtime"));
        fs::remove_dir_all(rootfs.parent().unwrap()).unwrap();
    }

    #[test]
    fn tmpfs_without_a_mode_has_that_of_its_directory() {
        let rootfs = rootfs("modes");
        fs::set_permissions(rootfs.join("real"), fs::Permissions::from_mode(0o700)).unwrap();
        for (mount, expected) in [
            (mount("tmpfs", "/real", &["nosuid"]), vec!["nosuid", "mode=700"]),
            (mount("tmpfs", "/absolute", &[]), vec!["mode=700"]),
            (mount("tmpfs", "/real", &["mode=755"]), vec!["mode=755"]),
            (mount("tmpfs", "/new", &["nosuid"]), vec!["nosuid"]),
            (mount("bind", "/real", &["rbind"]), vec!["rbind"]),
        ] {
            let mut mounts = [mount];
            adapt_mounts(&rootfs, &mut mounts).unwrap();
            assert_eq!(mounts[0].options().clone().unwrap_or_default(), expected);
        }
        fs::remove_dir_all(rootfs.parent().unwrap()).unwrap();
    }
}
