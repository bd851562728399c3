//! The kernel that a virtual machine boots: copied from its disk by the guest of the disk reader, or opened in a mount.

mod cache;

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nutshell_protocol::{DiskKernel, MAX_COMMAND_LINE, MAX_DISK_INITRD, MAX_DISK_KERNEL, Request, Response};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags, fcntl_add_seals};

pub(crate) use self::cache::{CacheEntry, KernelCache};
use super::{
    error::{DiskKernelError, VmError},
    regular_file::open_regular,
    volumes::as_user,
};
use crate::{
    oci::FileUser,
    shim::{
        blocking::DropOffThread,
        machine::{AgentError, GuestStream, Machine, printable_line},
    },
};

/// The maximum time from the boot of the disk reader's guest until the kernel is copied. The guest usually looks up a
/// few files and copies 50 MB.
const READ_LIMIT: Duration = Duration::from_secs(90);

/// The maximum time to receive the last bytes, which may still be in flight when the guest answers.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The slot of the disk in the machine of the disk reader.
const DISK_SLOT: u32 = 0;

/// The maximum length of the description of a kernel's source in the log, in characters.
pub(super) const MAX_SOURCE: usize = 512;

/// A kernel with its initramfs, ready to be booted.
#[derive(Debug)]
pub(crate) struct BootFiles {
    pub(super) kernel: DropOffThread<File>,
    pub(super) initramfs: Option<DropOffThread<File>>,
    pub(super) command_line: String,
    /// Where the kernel was found, for the log.
    pub(super) source: String,
}

#[derive(Debug)]
pub(super) enum KernelSource {
    /// The kernel that the disk's boot loader would boot. Each boot reads it again, because the guest may have replaced
    /// it.
    Disk,
    /// The same files at each boot.
    Files(BootFiles),
}

impl BootFiles {
    /// Where the kernel was found, for the log.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Duplicates the descriptors of the files. They share the file positions, which are not used.
    ///
    /// # Errors
    ///
    /// The errors of dup(2).
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            kernel: self.kernel.try_clone()?.into(),
            initramfs: match &self.initramfs {
                Some(initramfs) => Some(initramfs.try_clone()?.into()),
                None => None,
            },
            command_line: self.command_line.clone(),
            source: self.source.clone(),
        })
    }
}

/// Waits for the guest of the disk reader in `machine`, and copies the kernel that it finds on its disk into memory.
/// `disk` is the path of that disk in messages. Limits and checks everything that the guest sends: a malicious file
/// system on the disk may control it.
///
/// # Errors
///
/// The guest does not boot or answer in time, finds no kernel, or sends files that cannot be booted.
pub(crate) async fn read_disk_kernel(
    machine: &Machine,
    disk: &Path,
    ready_timeout: Duration,
) -> Result<BootFiles, VmError> {
    let failed = |exit| VmError::Reader {
        path: disk.to_owned(),
        exit,
    };
    machine.ready(ready_timeout).await.map_err(failed)?;
    let source = match tokio::time::timeout(READ_LIMIT, copy_kernel(machine)).await {
        Ok(Ok(files)) => return Ok(files),
        Ok(Err(DiskKernelError::Agent(AgentError::Gone))) => return Err(failed(machine.ended().await)),
        Ok(Err(error)) => error,
        Err(_) => DiskKernelError::Unusable(format!("it was not read within {} s", READ_LIMIT.as_secs())),
    };
    Err(VmError::DiskKernel {
        path: disk.to_owned(),
        source,
    })
}

async fn copy_kernel(machine: &Machine) -> Result<BootFiles, DiskKernelError> {
    let kernel = create_memory_file(c"kernel", MAX_DISK_KERNEL)?;
    let initramfs = create_memory_file(c"initrd", MAX_DISK_INITRD)?;
    let mut kernel_stream = machine.open_stream(None, Some(kernel.as_fd())).await?;
    let mut initramfs_stream = machine.open_stream(None, Some(initramfs.as_fd())).await?;
    let request = Request::FindDiskKernel {
        slot: DISK_SLOT,
        kernel_stream_port: kernel_stream.port(),
        initrd_stream_port: initramfs_stream.port(),
    };
    let found = machine.agent().ask(request, |response| match response {
        Response::DiskKernel(found) => Some(found),
        _ => None,
    });
    let found = found.await.map_err(|error| match error {
        AgentError::Failed(failure) => DiskKernelError::NotFound(failure),
        error => DiskKernelError::Agent(error),
    })?;
    let DiskKernel {
        kernel_size,
        initrd_size,
        command_line,
        source,
    } = found;
    finish(machine, &mut kernel_stream, &kernel, kernel_size, "kernel").await?;
    finish(machine, &mut initramfs_stream, &initramfs, initrd_size, "initrd").await?;
    if kernel_size == 0 {
        return Err(DiskKernelError::Unusable("its file is empty".to_owned()));
    }
    Ok(BootFiles {
        kernel: kernel.into(),
        initramfs: (initrd_size > 0).then(|| initramfs.into()),
        command_line: check_command_line(command_line)?,
        source: printable_line(&source, MAX_SOURCE),
    })
}

/// A file in memory that cannot grow beyond `max_size` bytes.
fn create_memory_file(name: &std::ffi::CStr, max_size: u64) -> Result<File, DiskKernelError> {
    let failed = |step| {
        move |errno: rustix::io::Errno| DiskKernelError::Memory {
            step,
            source: errno.into(),
        }
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(name, flags).map_err(failed("create a file in memory"))?;
    rustix::fs::ftruncate(&file, max_size).map_err(failed("set the size of a file in memory"))?;
    fcntl_add_seals(&file, SealFlags::GROW).map_err(failed("seal a file in memory"))?;
    Ok(file.into())
}

/// Waits until `file` has all `size` bytes, and truncates it to that size.
async fn finish(
    machine: &Machine,
    stream: &mut GuestStream,
    file: &File,
    size: u64,
    what: &'static str,
) -> Result<(), DiskKernelError> {
    let max = file.metadata().map_or(0, |metadata| metadata.len());
    if size > max {
        return Err(DiskKernelError::Unusable(format!(
            "the {what} has {size} bytes, more than the maximum of {max}"
        )));
    }
    let drained = tokio::time::timeout(DRAIN_LIMIT, machine.drain_stream(stream, size)).await;
    machine.close_stream(stream).await;
    if drained.is_err() {
        return Err(DiskKernelError::Unusable(format!(
            "the {what} did not arrive within {} s",
            DRAIN_LIMIT.as_secs()
        )));
    }
    file.set_len(size).map_err(|source| DiskKernelError::Memory {
        step: "set the size of a file in memory",
        source,
    })
}

/// Opens a kernel and its initramfs below `directory`, whose links may not lead out of it, with the permissions of
/// `user`. Blocks on its file system.
///
/// # Errors
///
/// A file does not exist, is not a regular file, or the user may not open it. The error names the annotation.
pub(crate) fn open_kernel_files(
    directory: &Path,
    kernel: &Path,
    initramfs: Option<&Path>,
    user: &FileUser,
) -> Result<BootFiles, VmError> {
    const KERNEL: &str = "annotation io.containerd.nutshell.vm.kernel";
    const INITRD: &str = "annotation io.containerd.nutshell.vm.initrd";
    Ok(BootFiles {
        kernel: open_beneath(directory, kernel, user, KERNEL)?,
        initramfs: initramfs
            .map(|path| open_beneath(directory, path, user, INITRD))
            .transpose()?,
        command_line: String::new(),
        source: format!("the kernel {} of the mount at /kernel", kernel.display()),
    })
}

fn open_beneath(
    directory: &Path,
    file: &Path,
    user: &FileUser,
    field: &'static str,
) -> Result<DropOffThread<File>, VmError> {
    let path = PathBuf::from("/kernel").join(file);
    let failed = |reason: String| VmError::KernelFile {
        field,
        path: path.clone(),
        reason,
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|error| failed(io::Error::from(error).to_string()))?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = as_user(user, || {
        open_regular(&root, file, resolve, OFlags::RDONLY).map_err(|error| failed(error.to_string()))
    });
    Ok(opened?.into())
}

/// Checks a command line from a disk. It must not contain control characters, which could forge lines of the host's
/// log.
pub(super) fn check_command_line(line: String) -> Result<String, DiskKernelError> {
    if line.len() > MAX_COMMAND_LINE {
        return Err(DiskKernelError::Unusable(format!(
            "its command line has {} bytes, more than the maximum of {MAX_COMMAND_LINE}",
            line.len()
        )));
    }
    match line.chars().find(|character| character.is_control()) {
        None => Ok(line),
        Some(character) => Err(DiskKernelError::Unusable(format!(
            "its command line contains the control character {character:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        os::unix::fs::{PermissionsExt, chown, symlink},
    };

    use super::*;

    #[test]
    fn file_in_memory_does_not_grow_beyond_its_maximum() {
        let mut file = create_memory_file(c"test", 4096).unwrap();
        assert_eq!(file.write(&[1; 8192]).unwrap(), 4096);
        file.write(&[1]).unwrap_err();
        file.set_len(10).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 10);
    }

    #[test]
    fn kernel_is_opened_through_links_inside_of_its_mount_only_ghsa_qv98_3369_g364() {
        let mount = tempfile::tempdir().unwrap();
        fs::create_dir(mount.path().join("boot")).unwrap();
        fs::write(mount.path().join("boot/vmlinuz-6.1"), "kernel").unwrap();
        symlink("/boot/vmlinuz-6.1", mount.path().join("vmlinuz")).unwrap();
        symlink("/etc/passwd", mount.path().join("outside")).unwrap();
        let open = |kernel: &str, initramfs: Option<&str>| {
            open_kernel_files(
                mount.path(),
                Path::new(kernel),
                initramfs.map(Path::new),
                &FileUser::default(),
            )
        };

        let mut text = String::new();
        open("vmlinuz", None).unwrap().kernel.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kernel");

        for (kernel, initramfs, expected) in [
            (
                "outside",
                None,
                "annotation io.containerd.nutshell.vm.kernel /kernel/outside: No such file",
            ),
            (
                "boot",
                None,
                "vm.kernel /kernel/boot: it is a directory, not a regular file",
            ),
            (
                "vmlinuz",
                Some("initrd.img"),
                "vm.initrd /kernel/initrd.img: No such file",
            ),
        ] {
            let error = open(kernel, initramfs).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn kernel_is_opened_with_the_permissions_of_the_containers_user() {
        let mount = tempfile::tempdir().unwrap();
        fs::set_permissions(mount.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (kernel, user) = (
            mount.path().join("vmlinuz"),
            FileUser {
                uid: 1000,
                ..FileUser::default()
            },
        );
        fs::write(&kernel, "kernel").unwrap();
        fs::set_permissions(&kernel, fs::Permissions::from_mode(0o400)).unwrap();
        let open = || open_kernel_files(mount.path(), Path::new("vmlinuz"), None, &user);

        let error = open().unwrap_err().to_string();

        assert!(error.contains("Permission denied"), "{error}");
        chown(&kernel, Some(1000), None).unwrap();
        open().unwrap();
    }

    #[test]
    fn command_line_with_a_control_character_is_refused() {
        assert_eq!(
            check_command_line("root=/dev/vda1 é".to_owned()).unwrap(),
            "root=/dev/vda1 é"
        );
        let error = check_command_line("a\nb".to_owned()).unwrap_err().to_string();
        assert!(error.contains("control character '\\n'"), "{error}");
        check_command_line("a".repeat(MAX_COMMAND_LINE + 1)).unwrap_err();
    }
}
