//! The guest image, a kernel and an initramfs: sections of this executable, or files that the host's configuration
//! names. The shim opens them and passes them to the vmm, which maps or copies them. A virtual machine that boots from
//! its disk needs a second machine, which finds the kernel on that disk. This one has a separate kernel, which supports
//! the file systems of such disks.
//!
//! `tools/embed-guest` adds the sections to the executable after it is linked, so that the guest's kernel and the
//! executable can be built in parallel. The sections are not loaded: only their position in the file matters.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use object::{
    Endianness,
    elf::FileHeader64,
    read::{
        ReadCache,
        elf::{FileHeader, SectionHeader},
    },
};

use crate::control::Extent;

const OWN_EXECUTABLE: &str = "/proc/self/exe";

/// The sections with the guest image. They are aligned to pages in the file, because the vmm maps the kernel from
/// there.
const KERNEL_SECTION: &str = ".nutshell.kernel";
const DISK_READER_KERNEL_SECTION: &str = ".nutshell.disk-reader-kernel";
const INITRAMFS_SECTION: &str = ".nutshell.initramfs";

/// The section with the program of an administrator's shell.
const SHELL_SECTION: &str = ".nutshell.shell";

/// Why the guest image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestImageError {
    #[error(
        "this executable contains no guest {0}: build it with `make build`, or name a guest {0} in the configuration"
    )]
    NotEmbedded(&'static str),
    #[error("this executable contains no {0} for reading disks of virtual machines: build it with `make build`")]
    NoDiskReader(&'static str),
    #[error("this executable contains no shell for the guest: build it with `make build`")]
    NoShell,
    #[error("cannot read the shell for the guest in {OWN_EXECUTABLE}: {0}: install the executable again")]
    UnreadableShell(#[source] io::Error),
    #[error("cannot read the sections of {OWN_EXECUTABLE}: {0}: install the executable again")]
    Executable(#[from] object::Error),
    #[error("cannot open the guest {part} {}: {source}", path.display())]
    Unreadable {
        /// `kernel` or `initramfs`.
        part: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// The files that a machine boots from.
#[derive(Debug)]
pub(crate) struct GuestImage {
    /// Contains an uncompressed ELF `vmlinux` or a `bzImage`.
    pub(crate) kernel: File,
    /// The kernel's position in the file.
    pub(crate) kernel_extent: Extent,
    /// Contains a cpio archive.
    pub(crate) initramfs: File,
    /// The archive's position in the file.
    pub(crate) initramfs_extent: Extent,
}

/// Opens the given files. For `None`, opens the section of this executable instead.
pub(crate) fn open(kernel: Option<&Path>, initramfs: Option<&Path>) -> Result<GuestImage, GuestImageError> {
    let (kernel, kernel_extent) = open_part("kernel", kernel, KERNEL_SECTION)?;
    let (initramfs, initramfs_extent) = open_part("initramfs", initramfs, INITRAMFS_SECTION)?;
    Ok(GuestImage {
        kernel,
        kernel_extent,
        initramfs,
        initramfs_extent,
    })
}

/// Opens the image of the machine that finds the kernel on a disk of a virtual machine. It boots on the container board.
/// Both parts are those of this executable: a configured kernel may lack the file systems of disks, and an initramfs is
/// configured together with it.
pub(crate) fn open_disk_reader() -> Result<GuestImage, GuestImageError> {
    let open = |part, section| {
        open_part(part, None, section).map_err(|error| match error {
            GuestImageError::NotEmbedded(part) => GuestImageError::NoDiskReader(part),
            error => error,
        })
    };
    let (kernel, kernel_extent) = open("kernel", DISK_READER_KERNEL_SECTION)?;
    let (initramfs, initramfs_extent) = open("initramfs", INITRAMFS_SECTION)?;
    Ok(GuestImage {
        kernel,
        kernel_extent,
        initramfs,
        initramfs_extent,
    })
}

/// Reads the program of an administrator's shell, a statically linked BusyBox.
pub(crate) fn read_shell() -> Result<Vec<u8>, GuestImageError> {
    let file = File::open(OWN_EXECUTABLE).map_err(GuestImageError::UnreadableShell)?;
    let Extent { offset, length } = find_section(&file, SHELL_SECTION)?.ok_or(GuestImageError::NoShell)?;
    let length = usize::try_from(length).map_err(io::Error::other);
    let mut program = vec![0; length.map_err(GuestImageError::UnreadableShell)?];
    file.read_exact_at(&mut program, offset)
        .map_err(GuestImageError::UnreadableShell)?;
    Ok(program)
}

fn open_part(part: &'static str, configured: Option<&Path>, section: &str) -> Result<(File, Extent), GuestImageError> {
    let path = configured.unwrap_or(Path::new(OWN_EXECUTABLE));
    let unreadable = |source| GuestImageError::Unreadable {
        part,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let extent = if configured.is_none() {
        find_section(&file, section)?.ok_or(GuestImageError::NotEmbedded(part))?
    } else {
        Extent {
            offset: 0,
            length: file.metadata().map_err(unreadable)?.len(),
        }
    };
    Ok((file, extent))
}

/// The position of a section in an ELF file, `None` if there is no such section.
fn find_section(file: &File, name: &str) -> Result<Option<Extent>, object::Error> {
    let cache = ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(&cache)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, &cache)?;
    let found = sections.section_by_name(endian, name.as_bytes());
    let range = found.and_then(|(_, section)| section.file_range(endian));
    Ok(range.map(|(offset, length)| Extent { offset, length }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[used]
    #[unsafe(link_section = ".nutshell.test")]
    static MARKER: [u8; 32] = *b"a section to find in this file..";

    #[test]
    fn section_is_found_by_name() {
        let file = File::open(OWN_EXECUTABLE).unwrap();
        let extent = find_section(&file, ".nutshell.test").unwrap().unwrap();
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, extent.offset).unwrap();
        assert_eq!((bytes, extent.length), (MARKER, 32));
    }

    #[test]
    fn error_without_an_embedded_image_names_the_remedy() {
        let error = open(None, None).unwrap_err();
        assert!(error.to_string().contains("make build"), "{error}");
    }

    #[test]
    fn error_without_an_embedded_disk_reader_does_not_suggest_the_configuration() {
        let error = open_disk_reader().unwrap_err().to_string();
        assert!(
            error.contains("kernel for reading disks") && !error.contains("configuration"),
            "{error}"
        );
    }

    #[test]
    fn missing_configured_kernel_is_an_error_that_names_it() {
        let error = open(Some(Path::new("/no/such/vmlinux")), None).unwrap_err();
        assert!(error.to_string().contains("/no/such/vmlinux"), "{error}");
    }
}
