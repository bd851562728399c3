//! The guest's kernel: an uncompressed ELF `vmlinux` ([`elf`]) or a compressed `bzImage` ([`bzimage`]).
//!
//! The file is untrusted: a kernel may come from a disk that a guest wrote. Every field is checked before use, and
//! reads are bounded by the kernel's extent. What the loaded kernel does is confined to the guest. Does not belong
//! here: the boot protocol's other structures, which [`super::tables`] writes. [`crate::vmm::build`] calls [`load`].

mod bzimage;
mod elf;
#[cfg(any(test, fuzzing))]
pub(in crate::vmm) mod fuzz;
mod image;

use std::fs::File;

use self::image::Image;
pub(in crate::vmm) use self::image::{KernelError, LoadedKernel};
use crate::{control::Extent, memory::MemoryRegions};

/// Loads the kernel at `extent` of `file`. Its magic numbers decide between the two formats. The file must not shrink
/// while the machine runs: parts of a `vmlinux` stay mapped.
pub(in crate::vmm) fn load(memory: &MemoryRegions, file: &File, extent: Extent) -> Result<LoadedKernel, KernelError> {
    let image = Image { file, extent };
    if elf::is_elf(&image)? {
        elf::load(memory, &image)
    } else if bzimage::is_bzimage(&image)? {
        bzimage::load(memory, &image)
    } else {
        Err(KernelError::UnknownFormat)
    }
}
