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
    os::unix::fs::{FileExt, OpenOptionsExt},
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

/// The name of the agent in the initramfs (`guest/image/build`).
const AGENT_NAME: &[u8] = b"init";

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
    #[error("this executable contains no agent for virtual machines: build it with `make build`")]
    NoAgent,
    #[error("cannot read the agent for virtual machines in {OWN_EXECUTABLE}: {0}: install the executable again")]
    UnreadableAgent(#[source] io::Error),
    #[error("this executable contains no shell for the guest: build it with `make build`")]
    NoShell,
    #[error("cannot read the shell for the guest in {OWN_EXECUTABLE}: {0}: install the executable again")]
    UnreadableShell(#[source] io::Error),
    #[error("cannot read the sections of {OWN_EXECUTABLE}: {0}: install the executable again")]
    Executable(#[from] object::Error),
    #[error(
        "cannot open the guest {part} {}: {source}: correct guest.{part} in the configuration, or install the executable \
         again",
        path.display()
    )]
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

/// Opens the image of the machine that finds the kernel on a disk of a virtual machine. It boots on the container
/// board. Both parts are those of this executable: a configured kernel may lack the file systems of disks, and an
/// initramfs is configured together with it.
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

/// Opens the file with the agent's program, which is in the initramfs of this executable. Returns the program's
/// position in it.
pub(crate) fn open_agent() -> Result<(File, Extent), GuestImageError> {
    let file = File::open(OWN_EXECUTABLE).map_err(GuestImageError::UnreadableAgent)?;
    let initramfs = find_section(&file, INITRAMFS_SECTION)?.ok_or(GuestImageError::NoAgent)?;
    let agent = find_in_archive(&file, initramfs, AGENT_NAME).map_err(GuestImageError::UnreadableAgent)?;
    Ok((file, agent.ok_or(GuestImageError::NoAgent)?))
}

/// Finds the content of a file in uncompressed cpio archives of this project, one after the other with zeros between
/// them (kernel documentation, `driver-api/early-userspace/buffer-format.rst`).
fn find_in_archive(file: &File, archive: Extent, name: &[u8]) -> io::Result<Option<Extent>> {
    const MAGIC: &[u8] = b"070701";
    const HEADER_SIZE: usize = 110;
    /// The positions of the size of the content and of the name, each 8 hexadecimal digits.
    const SIZE: usize = 54;
    const NAME_SIZE: usize = 94;
    const MAX_NAME_SIZE: usize = 256;
    const ALIGNMENT: usize = 4;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the archive is malformed");
    let end = archive.offset.saturating_add(archive.length);
    let mut position = archive.offset;
    while position.saturating_add(HEADER_SIZE as u64) <= end {
        let mut header = [0; HEADER_SIZE];
        file.read_exact_at(&mut header, position)?;
        let zeros = header.iter().take_while(|byte| **byte == 0).count();
        if zeros >= ALIGNMENT {
            position += (zeros - zeros % ALIGNMENT) as u64;
            continue;
        }
        let number = |at: usize| {
            let digits = std::str::from_utf8(&header[at..at + 8]).ok()?;
            u32::from_str_radix(digits, 16).ok()
        };
        let (size, name_size) = number(SIZE).zip(number(NAME_SIZE)).ok_or_else(malformed)?;
        let name_size = usize::try_from(name_size).unwrap_or(usize::MAX);
        if !header.starts_with(MAGIC) || name_size > MAX_NAME_SIZE {
            return Err(malformed());
        }
        let mut found = vec![0; name_size];
        file.read_exact_at(&mut found, position + HEADER_SIZE as u64)?;
        let aligned = |length: u64| length.next_multiple_of(ALIGNMENT as u64);
        let content = position + aligned((HEADER_SIZE + name_size) as u64);
        if found.strip_suffix(&[0]) == Some(name) {
            let length = u64::from(size);
            return Ok((content + length <= end).then_some(Extent {
                offset: content,
                length,
            }));
        }
        position = content + aligned(size.into());
    }
    Ok(None)
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
    // Without O_NONBLOCK, opening a fifo would wait for a writer.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(unreadable)?;
    let extent = if configured.is_none() {
        find_section(&file, section)?.ok_or(GuestImageError::NotEmbedded(part))?
    } else {
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(unreadable(io::Error::other("it is not a regular file")));
        }
        Extent {
            offset: 0,
            length: metadata.len(),
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
    fn file_is_found_in_archives_by_name() {
        let entry = |name: &str, content: &[u8]| {
            let (size, name_size) = (content.len(), name.len() + 1);
            let mut entry = format!(
                "070701{:040}00000000{size:08x}{:032}{name_size:08x}00000000{name}\0",
                0, 0
            )
            .into_bytes();
            entry.resize(entry.len().next_multiple_of(4), 0);
            entry.extend(content);
            entry.resize(entry.len().next_multiple_of(4), 0);
            entry
        };
        let end = || entry("TRAILER!!!", b"");
        let first = [entry("dev", b""), end(), vec![0; 500]].concat();
        let archive = [first, entry("init", b"program"), end()].concat();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&archive, 9).unwrap();
        let whole = Extent {
            offset: 9,
            length: archive.len() as u64,
        };

        let found = find_in_archive(&file, whole, b"init").unwrap().unwrap();

        let mut content = [0; 7];
        file.read_exact_at(&mut content, found.offset).unwrap();
        assert_eq!((&content, found.length), (b"program", 7));
        assert!(find_in_archive(&file, whole, b"nosuch").unwrap().is_none());
        let cut = Extent { length: 130, ..whole };
        assert!(find_in_archive(&file, cut, b"init").unwrap().is_none());
        let shifted = Extent { offset: 10, ..whole };
        find_in_archive(&file, shifted, b"init").unwrap_err();
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
