//! Guest memory: the table of its regions, which every device reads, and the mappings behind them.
//!
//! What lives here: where memory lies in guest physical space, what backs it, how it grows. What may not live
//! here: who uses it. [`crate::vmm`] allocates it and [`crate::devices`] read and write it.

pub(crate) mod map;

use std::{ops::Deref, sync::Arc};

use parking_lot::RwLock;

use vm_memory::GuestMemoryMmap;

/// Guest memory as it is at some time.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// Guest memory, as every device sees it. It grows and never shrinks: what was memory once stays mapped
/// until the process ends, so that no device need be stopped for it.
#[derive(Debug, Clone)]
pub(crate) struct GuestMemory(Arc<RwLock<&'static Memory>>);

impl GuestMemory {
    /// What a machine starts with.
    pub(crate) fn new(memory: Memory) -> Self {
        Self(Arc::new(RwLock::new(Box::leak(Box::new(memory)))))
    }

    /// What it is now. To be asked again for each batch of work: buffers may lie in what came since.
    pub(crate) fn now(&self) -> &'static Memory {
        *self.0.read()
    }

    /// Has `memory`, all of what it was and more, take its place. The table of the regions before stays
    /// allocated, a few hundred bytes: callers bound how often.
    pub(crate) fn grow(&self, memory: Memory) {
        *self.0.write() = Box::leak(Box::new(memory));
    }
}

impl Deref for GuestMemory {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        self.now()
    }
}
