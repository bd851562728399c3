//! Makes an overlay of layers (EROFS file systems in files) whose upper directory is on the host, as containerd's mount
//! manager would (containerd, `core/mount/manager`). The guest assembles all other roots of layers.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
};

use super::{
    detached::clone_mount,
    error::{ShareError, attach_error},
    loop_device::LoopDevice,
    rootfs::{enter_private_namespace, escape_layer, make_mount},
};
use crate::{
    jail::step,
    oci::{HostMount, HostOverlay, RootLayer},
};

/// Makes the overlay at `rootfs` and returns it as a detached mount. Leaves the calling thread in a new mount namespace,
/// which has the mounts of the layers.
pub(super) fn mount_detached(overlay: &HostOverlay, rootfs: &Path) -> Result<OwnedFd, ShareError> {
    let failed = attach_error(rootfs, "a root file system");
    enter_private_namespace()
        .map_err(step("unshare mounts"))
        .map_err(&failed)?;
    mount("tmpfs", rootfs, "tmpfs", MountFlags::empty(), c"mode=755,size=1m")
        .map_err(|error| failed(("mount a tmpfs for the layers", error.into())))?;
    for (number, layer) in overlay.layers.iter().enumerate() {
        let mount_point = rootfs.join(number.to_string());
        mount_layer(layer, &mount_point).map_err(|source| ShareError::Rootfs {
            kind: layer.filesystem.clone(),
            from: layer.source.display().to_string(),
            at: mount_point.display().to_string(),
            options: layer.options.clone(),
            source,
        })?;
    }
    let mount = overlay_mount(overlay, rootfs)
        .map_err(step("name the directories of the overlay"))
        .map_err(&failed)?;
    make_mount(&mount, rootfs).map_err(|source| ShareError::Rootfs {
        kind: mount.kind,
        from: mount.source,
        at: rootfs.display().to_string(),
        options: mount.options,
        source,
    })?;
    clone_mount(rootfs, false)
        .map_err(step("detach the overlay"))
        .map_err(&failed)
}

/// Mounts a layer: from its files directly if the host's kernel can mount this type of file system from a regular file,
/// and otherwise from loop devices.
fn mount_layer(layer: &RootLayer, mount_point: &Path) -> io::Result<()> {
    fs::create_dir(mount_point)?;
    let files: Vec<PathBuf> = std::iter::once(&layer.source).chain(&layer.devices).cloned().collect();
    match mount_sources(layer, &files, mount_point) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTBLK) => {
            let attach = |path: &PathBuf| LoopDevice::attach_read_only(&File::open(path)?);
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

fn overlay_mount(overlay: &HostOverlay, rootfs: &Path) -> io::Result<HostMount> {
    let lower = overlay
        .lower
        .iter()
        .map(|layer| escape_layer(&rootfs.join(layer.to_string())));
    let lower = lower.collect::<io::Result<Vec<_>>>()?.join(":");
    let mut options = overlay.options.clone();
    options.extend([
        format!("upperdir={}", overlay.upper),
        format!("workdir={}", overlay.work),
        format!("lowerdir={lower}"),
    ]);
    Ok(HostMount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    })
}
