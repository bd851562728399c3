//! A kernel's file before it is loaded, the result of loading it, and the errors.

use std::{fs::File, io, os::unix::fs::FileExt};

use linux_loader::loader::bootparam::setup_header;

use crate::{control::Extent, memory::MemoryError};

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("the guest's kernel is neither an ELF vmlinux nor a bzImage: name another file")]
    UnknownFormat,
    #[error("the guest's kernel is not an uncompressed x86-64 ELF vmlinux: {0}: name another file")]
    Elf(&'static str),
    #[error("the guest's kernel is not a bzImage that can be booted: {0}: name another file")]
    BzImage(&'static str),
    #[error(
        "the guest's kernel needs {bytes} bytes of memory at {address:#x}, but memory for it ends at {end:#x}: give \
         the machine more memory"
    )]
    TooLarge {
        /// Guest physical address.
        address: u64,
        bytes: u64,
        /// The first guest physical address that the kernel cannot use.
        end: u64,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot read the guest's kernel: {0}")]
    Read(#[source] io::Error),
}

/// A kernel in guest memory. Addresses are guest physical.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::vmm) struct LoadedKernel {
    /// The address of the first instruction.
    pub(in crate::vmm) entry: u64,
    /// The first address after the memory that the kernel uses until it reads the memory map.
    pub(in crate::vmm) end: u64,
    /// The setup header of a bzImage, as it is in the file.
    pub(in crate::vmm) setup: Option<setup_header>,
}

impl LoadedKernel {
    /// The last address that an initramfs may occupy, `None` if the kernel states none.
    pub(in crate::vmm) fn max_initramfs_address(&self) -> Option<u64> {
        self.setup.map(|setup| setup.initrd_addr_max.into())
    }

    /// The maximum length of the command line in bytes, without the terminating NUL. `None` if the kernel states none.
    pub(in crate::vmm) fn max_command_line(&self) -> Option<usize> {
        self.setup
            .map(|setup| usize::try_from(setup.cmdline_size).unwrap_or(usize::MAX))
    }
}

/// A kernel in a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image<'f> {
    pub(super) file: &'f File,
    pub(super) extent: Extent,
}

impl Image<'_> {
    /// Fills `target` with the bytes at `offset`. `false` if the image ends before.
    pub(super) fn read(&self, offset: u64, target: &mut [u8]) -> Result<bool, KernelError> {
        let Some(part) = self.part(offset, target.len() as u64) else {
            return Ok(false);
        };
        match self.file.read_exact_at(target, part.offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(KernelError::Read(error)),
        }
    }

    /// The position in the file of `length` bytes at `offset` of the image. `None` if they do not lie inside.
    pub(super) fn part(&self, offset: u64, length: u64) -> Option<Extent> {
        let end = offset.checked_add(length)?;
        let file_offset = self.extent.offset.checked_add(offset)?;
        (end <= self.extent.length).then_some(Extent {
            offset: file_offset,
            length,
        })
    }
}
