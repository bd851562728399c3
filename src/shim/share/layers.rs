//! Assembles a root file system from layers (file systems in files) on the host, as containerd's mount manager would
//! (containerd, `core/mount/manager`). This is for an overlay whose upper directory is on the host, and for the image
//! of a virtual machine, in which the host opens files. The guest assembles all other roots.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nutshell_linux::beneath::{create_directory, open_directory};
use nutshell_protocol::LayerPath;
use rustix::{
    io::Errno,
    mount::{MountAttrFlags, MountFlags, MountPropagationFlags, mount},
};

use super::{
    detached::{clone_mount, clone_mount_of},
    error::{ShareError, attach_error},
    loop_device::LoopDevice,
    rootfs::{enter_private_namespace, escape_layer, make_mount},
};
use crate::{
    jail::{step, syscalls::mount_setattr},
    oci::{HostMount, LayersMount, RootLayer, RootLayers, UpperDirectory},
};

/// Makes the root at `rootfs` and returns it as a detached mount. Leaves the calling thread in a new mount namespace,
/// which has the mounts of the layers.
pub(super) fn mount_detached(root: &RootLayers, rootfs: &Path) -> Result<OwnedFd, ShareError> {
    let failed = attach_error(rootfs, "a root file system");
    enter_private_namespace()
        .map_err(step("unshare mounts"))
        .map_err(&failed)?;
    mount("tmpfs", rootfs, "tmpfs", MountFlags::empty(), c"mode=755,size=1m")
        .map_err(|error| failed(("mount a tmpfs for the layers", error.into())))?;
    for (number, layer) in root.layers.iter().enumerate() {
        let mount_point = rootfs.join(number.to_string());
        mount_layer(layer, &mount_point).map_err(|source| ShareError::Rootfs {
            kind: layer.filesystem.clone(),
            from: layer.source.display().to_string(),
            at: mount_point.display().to_string(),
            options: layer.options.clone(),
            source,
        })?;
    }
    for directory in &root.directories {
        let path = &directory.path;
        open_in_layer(rootfs, path.layer, "")
            .and_then(|layer| create_directory(layer, Path::new(&path.path), directory.mode, directory.owner))
            .map_err(step("create a directory in a layer"))
            .map_err(&failed)?;
    }
    match &root.mount {
        LayersMount::Directory { path, read_only } => open_in_layer(rootfs, path.layer, &path.path)
            .and_then(|directory| {
                let tree = clone_mount_of(directory.as_fd(), false)?;
                if *read_only {
                    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
                    mount_setattr(tree.as_fd(), attributes, MountPropagationFlags::empty(), false)?;
                }
                Ok(tree)
            })
            .map_err(step("open the directory of the root in its layer"))
            .map_err(&failed),
        LayersMount::Overlay { lower, upper, options } => {
            let overlay = overlay_mount(rootfs, lower, upper.as_ref(), options);
            let overlay = overlay
                .map_err(step("find the directories of the overlay"))
                .map_err(&failed)?;
            make_mount(&overlay, rootfs).map_err(|source| ShareError::Rootfs {
                kind: overlay.kind,
                from: overlay.source,
                at: rootfs.display().to_string(),
                options: overlay.options,
                source,
            })?;
            clone_mount(rootfs, false)
                .map_err(step("detach the overlay"))
                .map_err(&failed)
        }
    }
}

/// Mounts a layer: from its files directly if the host's kernel can mount this type of file system from a regular file,
/// and otherwise from loop devices.
fn mount_layer(layer: &RootLayer, mount_point: &Path) -> io::Result<()> {
    fs::create_dir(mount_point)?;
    let files: Vec<PathBuf> = std::iter::once(&layer.source).chain(&layer.devices).cloned().collect();
    match mount_sources(layer, &files, mount_point) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTBLK) => {
            let attach = |path: &PathBuf| {
                let file: File = OpenOptions::new().read(true).write(!layer.read_only).open(path)?;
                LoopDevice::attach(&file, layer.read_only)
            };
            let devices = files.iter().map(attach).collect::<io::Result<Vec<_>>>()?;
            let paths: Vec<_> = devices.iter().map(|device| device.path.clone()).collect();
            mount_sources(layer, &paths, mount_point)
        }
        mounted => mounted,
    }
}

/// Mounts the first of `sources`, and passes the others to the file system as its devices.
fn mount_sources(layer: &RootLayer, sources: &[PathBuf], mount_point: &Path) -> io::Result<()> {
    let (first, devices) = sources.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let devices = devices.iter().map(|device| format!("device={}", device.display()));
    let mount = HostMount {
        kind: layer.filesystem.clone(),
        source: first.display().to_string(),
        target: String::new(),
        options: layer.options.iter().cloned().chain(devices).collect(),
    };
    make_mount(&mount, mount_point)
}

fn open_in_layer(rootfs: &Path, layer: u32, path: &str) -> io::Result<OwnedFd> {
    open_directory(File::open(rootfs.join(layer.to_string()))?, Path::new(path))
}

fn overlay_mount(
    rootfs: &Path,
    lower: &[LayerPath],
    upper: Option<&UpperDirectory>,
    options: &[String],
) -> io::Result<HostMount> {
    let place = |path: &LayerPath| {
        // The kernel follows symbolic links in the options.
        open_in_layer(rootfs, path.layer, &path.path)?;
        escape_layer(&rootfs.join(path.layer.to_string()).join(&path.path))
    };
    let mut options = options.to_vec();
    match upper {
        None => {}
        Some(UpperDirectory::OnHost { upper, work }) => {
            options.extend([format!("upperdir={upper}"), format!("workdir={work}")]);
        }
        Some(UpperDirectory::InLayer { upper, work }) => {
            options.extend([
                format!("upperdir={}", place(upper)?),
                format!("workdir={}", place(work)?),
            ]);
        }
    }
    let lower = lower.iter().map(place).collect::<io::Result<Vec<_>>>()?;
    options.push(format!("lowerdir={}", lower.join(":")));
    Ok(HostMount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    })
}
