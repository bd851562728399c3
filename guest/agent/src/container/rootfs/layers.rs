//! A root file system that is assembled from layers: several file systems, each in a part of a disk.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nutshell_protocol::{DiskPart, Failure, Layer, LayerPath, LayeredRoot, NewDirectory, RootMount};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::beneath::{create_directory, open_directory};
use super::mounting::{split_options, unmount};
use crate::failure::Context;
use crate::machine::disk;

/// The folder of a bundle with the mount points of the layers, whose names are their numbers.
const LAYERS: &str = "layers";

/// Mounts each layer, and the root at `target`, which is in the container's bundle.
pub(super) fn mount_layers(
    device: &Path,
    parts: &[DiskPart],
    layers: &[Layer],
    root: &LayeredRoot,
    target: &Path,
) -> Result<(), Failure> {
    let bundle = target.parent().unwrap_or(Path::new("/"));
    let partitions =
        disk::divide(device, parts).context(|| format!("divide the disk {} into partitions", device.display()))?;
    for (number, layer) in layers.iter().enumerate() {
        mount_layer(&partitions, layer, &mount_point(bundle, number)).context(|| {
            let name = &layer.filesystem;
            format!("mount layer {number} ({name}) of the rootfs")
        })?;
    }
    for directory in &root.directories {
        create(bundle, directory)
            .context(|| format!("create {:?} in layer {}", directory.path.path, directory.path.layer))?;
    }
    match &root.mount {
        RootMount::Directory { path, read_only } => {
            bind(bundle, path, *read_only, target).context(|| format!("bind {:?} as rootfs", path.path))
        }
        RootMount::Overlay { lower, upper, options } => {
            mount_overlay(bundle, lower, upper.as_ref(), options, target).context(|| "mount the overlay".to_owned())
        }
    }
}

/// Unmounts the layers of the container with this bundle, the last first. Its root must not be mounted any more.
pub(crate) fn unmount_layers(bundle: &Path) -> io::Result<()> {
    let directory = bundle.join(LAYERS);
    let count = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?.count(),
    };
    for number in (0..count).rev() {
        unmount(&mount_point(bundle, number))?;
    }
    fs::remove_dir(&directory)
}

fn mount_point(bundle: &Path, number: usize) -> PathBuf {
    bundle.join(LAYERS).join(number.to_string())
}

fn mount_layer(partitions: &[PathBuf], layer: &Layer, mount_point: &Path) -> io::Result<()> {
    let partition = |index: u32| {
        let found = usize::try_from(index).ok().and_then(|index| partitions.get(index));
        found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let (flags, mut data) = split_options(&layer.options);
    for device in &layer.devices {
        if !data.is_empty() {
            data.push(',');
        }
        data.push_str(&format!("device={}", partition(*device)?.display()));
    }
    fs::create_dir_all(mount_point)?;
    let source = partition(layer.part)?;
    let data = to_c_string(data)?;
    Ok(rustix::mount::mount(
        source,
        mount_point,
        layer.filesystem.as_str(),
        flags,
        data.as_c_str(),
    )?)
}

fn create(bundle: &Path, directory: &NewDirectory) -> io::Result<()> {
    let root = open_in_layer(bundle, directory.path.layer, "")?;
    create_directory(root, Path::new(&directory.path.path), directory.mode, directory.owner)
}

/// Opens a directory of a layer. A container may have written the layer before, so no symbolic link is followed.
fn open_in_layer(bundle: &Path, layer: u32, path: &str) -> io::Result<OwnedFd> {
    let number = usize::try_from(layer).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(mount_point(bundle, number), flags, Mode::empty())?;
    open_directory(root, Path::new(path))
}

fn bind(bundle: &Path, path: &LayerPath, read_only: bool, target: &Path) -> io::Result<()> {
    let directory = open_in_layer(bundle, path.layer, &path.path)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(&directory, c"", flags)?;
    rustix::mount::move_mount(&tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    if read_only {
        rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    }
    Ok(())
}

/// Mounts an overlay. Its paths are relative to the folder of the layers: with 240 layers, absolute ones would exceed
/// the kernel's limit of a page for the options of a mount.
fn mount_overlay(
    bundle: &Path,
    lower: &[LayerPath],
    upper: Option<&(LayerPath, LayerPath)>,
    options: &[String],
    target: &Path,
) -> io::Result<()> {
    let relative = |path: &LayerPath| -> io::Result<String> {
        // The kernel follows symbolic links in the options.
        open_in_layer(bundle, path.layer, &path.path)?;
        Ok(match path.path.as_str() {
            "" => path.layer.to_string(),
            below => format!("{}/{below}", path.layer),
        })
    };
    let lower = lower.iter().map(relative).collect::<io::Result<Vec<_>>>()?;
    let (flags, mut data) = split_options(options);
    if !data.is_empty() {
        data.push(',');
    }
    data.push_str(&format!("lowerdir={}", lower.join(":")));
    if let Some((upper, work)) = upper {
        data.push_str(&format!(",upperdir={},workdir={}", relative(upper)?, relative(work)?));
    }
    let data = to_c_string(data)?;
    rustix::process::chdir(bundle.join(LAYERS))?;
    let mounted = rustix::mount::mount("overlay", target, "overlay", flags, data.as_c_str());
    rustix::process::chdir("/")?;
    Ok(mounted?)
}

fn to_c_string(text: String) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}
