//! The receivers of a console's output.

use super::console_tail::ConsoleTail;

/// Takes the guest's output. vCPU threads call it, so it must not block, and must bound what it keeps.
pub(crate) trait OutputSink: Send + Sync {
    fn append(&self, bytes: &[u8]);
}

impl OutputSink for ConsoleTail {
    fn append(&self, bytes: &[u8]) {
        Self::append(self, bytes);
    }
}
