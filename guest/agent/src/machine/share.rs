//! Mounts the virtio-fs device with the pod's shared directories.

use std::fs;
use std::io;
use std::path::Path;

use nutshell_protocol::{SHARE_PATH, SHARE_TAG};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::mount::MountFlags;

/// Mounts the share at [`SHARE_PATH`] unless it is mounted already.
pub(crate) fn mount() -> io::Result<()> {
    fs::create_dir_all(SHARE_PATH)?;
    // Two jobs may create containers at the same time.
    let parent = Path::new(SHARE_PATH).parent().unwrap_or(Path::new("/"));
    let lock = rustix::fs::open(
        parent,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    if !is_mounted()? {
        rustix::mount::mount(SHARE_TAG, SHARE_PATH, "virtiofs", MountFlags::empty(), None)?;
    }
    Ok(())
}

fn is_mounted() -> io::Result<bool> {
    let parent = Path::new(SHARE_PATH).parent().unwrap_or(Path::new("/"));
    Ok(rustix::fs::stat(SHARE_PATH)?.st_dev != rustix::fs::stat(parent)?.st_dev)
}
