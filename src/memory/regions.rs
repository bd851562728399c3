//! The table of memory regions, which grows while devices use it.

use std::{ops::Deref, sync::Arc};

use parking_lot::RwLock;
use vm_memory::GuestMemoryMmap;

/// The regions of guest memory at one point in time.
pub(crate) type MemoryRegions = GuestMemoryMmap<()>;

/// Guest memory, shared by all devices. It grows and never shrinks: a region stays mapped until the process ends, so
/// growth does not have to stop any device.
#[derive(Debug, Clone)]
pub(crate) struct GuestMemory(Arc<RwLock<&'static MemoryRegions>>);

impl GuestMemory {
    /// The memory that a machine boots with.
    pub(crate) fn new(regions: MemoryRegions) -> Self {
        Self(Arc::new(RwLock::new(Box::leak(Box::new(regions)))))
    }

    /// Like [`Self::new`], but leaks nothing, so that a test can make any number of these.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_table(table: &'static MemoryRegions) -> Self {
        Self(Arc::new(RwLock::new(table)))
    }

    /// The current regions. Call it again for each batch of work: buffers may lie in memory that was added since.
    pub(crate) fn regions(&self) -> &'static MemoryRegions {
        *self.0.read()
    }

    /// Replaces the regions with `regions`, which must contain all of the current ones. The old table is leaked, a few
    /// hundred bytes: callers must bound the number of calls.
    pub(crate) fn grow(&self, regions: MemoryRegions) {
        self.set_table(Box::leak(Box::new(regions)));
    }

    /// Like [`Self::grow`], but leaks nothing: `table` is static.
    pub(crate) fn set_table(&self, table: &'static MemoryRegions) {
        *self.0.write() = table;
    }
}

impl Deref for GuestMemory {
    type Target = MemoryRegions;

    fn deref(&self) -> &MemoryRegions {
        self.regions()
    }
}
