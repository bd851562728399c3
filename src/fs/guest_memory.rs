//! The guest's memory, as the vmm shares it with the file server.

use std::{
    io,
    mem::ManuallyDrop,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use rustix::io::DupFlags;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtiofsd_memory::{GuestMemory, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap, GuestMemoryRegion};

/// The guest's memory. The vmm sends its regions before it starts a queue, and may add some later.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The guest's memory at one moment.
pub(super) type MemorySnapshot = GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>;

/// Guest memory without regions.
pub(super) fn empty_memory() -> Memory {
    GuestMemoryAtomic::new(GuestMemoryMmap::new())
}

/// Closes the files that `memory` maps: mappings do not need them. Boot memory may be a file that cannot be sealed, and a
/// process that shrinks it would end the vmm with SIGBUS.
///
/// The regions keep the descriptor numbers, which refer to standard input afterwards.
pub(super) fn close_files(memory: &MemorySnapshot) -> io::Result<()> {
    for file in memory.iter().filter_map(|region| region.file_offset()) {
        // SAFETY: the region owns the descriptor, and `ManuallyDrop` never closes it. No code
        // uses the file of a region.
        let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(file.file().as_raw_fd()) });
        rustix::io::dup3(io::stdin(), &mut number, DupFlags::CLOEXEC)?;
    }
    Ok(())
}
