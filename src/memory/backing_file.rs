//! The files that become shared guest memory.

use std::{fs::File, io};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen},
};

/// Creates an empty file on a tmpfs of its own, whose mappings can have huge pages. A memfd has none, unless the host's
/// administrator allows it for all of them (`shmem_enabled`).
///
/// The file cannot be sealed. A process that shrinks it ends every process that uses the missing part of its mapping.
///
/// # Errors
///
/// The caller lacks CAP_SYS_ADMIN, or the host's kernel has no huge pages.
pub(crate) fn create_huge_page_file() -> io::Result<File> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "guest-memory")?;
    fsconfig_set_string(&context, "huge", "advise")?;
    // Without a limit, which would be half of the host's memory. The size of the file limits its memory.
    fsconfig_set_string(&context, "size", "0")?;
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let directory = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // The file keeps the file system until the last process has closed and unmapped it.
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(openat(&directory, ".", flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Creates an empty file that grows, but cannot be shrunk.
pub(crate) fn create_sealed_file() -> io::Result<File> {
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}
