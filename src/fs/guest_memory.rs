//! The guest's memory, as the vmm shares it with the file server.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtiofsd_memory::{GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};

/// The guest's memory. The vmm sends its regions before it starts a queue, and may add some later.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The guest's memory at one moment.
pub(super) type MemorySnapshot = GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>;

/// Guest memory without regions.
pub(super) fn empty_memory() -> Memory {
    GuestMemoryAtomic::new(GuestMemoryMmap::new())
}
