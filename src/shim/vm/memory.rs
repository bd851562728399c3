//! Changes of the memory of a virtual machine while its guest runs.

use std::time::Duration;

use tokio::sync::Mutex;

use crate::shim::machine::{Machine, VmmError};

/// How long the guest's kernel may take to add or remove memory.
const PLUG_LIMIT: Duration = Duration::from_secs(10);

/// Why the memory cannot be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error(
        "the guest's kernel did not {action} the memory within {} s: it needs the driver virtio_mem, and only memory that \
         is not in use can be removed",
        PLUG_LIMIT.as_secs()
    )]
    NotTaken { action: &'static str },
}

/// The memory of the guest that runs.
#[derive(Debug, Default)]
pub(super) struct MachineMemory {
    sizes: Mutex<Sizes>,
}

/// In bytes.
#[derive(Debug, Default)]
struct Sizes {
    /// The machine never has less.
    boot: u64,
    present: u64,
}

impl MachineMemory {
    /// Records the size of a machine that has booted.
    pub(super) fn begin(&self, boot: u64) {
        // Nothing changes the memory of a machine that is not running yet.
        if let Ok(mut sizes) = self.sizes.try_lock() {
            *sizes = Sizes { boot, present: boot };
        }
    }

    /// Changes the size to `memory` bytes, at least that at boot. Undone if the guest does not take part. Concurrent
    /// calls run one after the other.
    pub(super) async fn set(&self, machine: &Machine, vcpus: u8, memory: u64) -> Result<(), MemoryError> {
        let mut sizes = self.sizes.lock().await;
        let added = |memory: u64| memory.saturating_sub(sizes.boot);
        if memory == sizes.present {
            return Ok(());
        }
        machine.resize(added(memory), vcpus).await?;
        let settled = machine.memory_plugged(added(memory));
        if tokio::time::timeout(PLUG_LIMIT, settled).await.is_err() {
            // A slow guest could complete the change later, and then have another size than is recorded.
            if let Err(error) = machine.resize(added(sizes.present), vcpus).await {
                log::warn!("cannot undo a change of the memory of a virtual machine: {error}");
            }
            let action = if memory > sizes.present { "add" } else { "remove" };
            return Err(MemoryError::NotTaken { action });
        }
        sizes.present = memory;
        Ok(())
    }
}
