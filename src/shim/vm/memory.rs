//! Changes of the memory of a virtual machine while its guest runs.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::shim::machine::{Machine, VmmError};

/// How long the guest's kernel may take to add or remove memory.
const PLUG_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// Why the memory cannot be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error(
        "the limit of {} MiB is less than {} MiB, with which the virtual machine has booted",
        memory >> 20,
        booted >> 20
    )]
    TooSmall { memory: u64, booted: u64 },
    #[error(
        "the guest's kernel did not {action} the memory within {} s: it needs the driver virtio_mem, and it can remove \
         only memory that is not in use",
        PLUG_LIMIT.as_secs()
    )]
    NotTaken { action: &'static str },
}

/// The memory of the guest.
#[derive(Debug)]
pub(super) struct MachineMemory {
    /// Serializes changes.
    changing: tokio::sync::Mutex<()>,
    sizes: Mutex<Sizes>,
}

/// In bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// The memory with which the running machine has booted. It never has less.
    booted: u64,
    /// The memory that it has, and with which it boots next.
    present: u64,
}

impl MachineMemory {
    /// The memory of a machine that will boot with `memory` bytes.
    pub(super) fn new(memory: u64) -> Self {
        let sizes = Sizes {
            booted: 0,
            present: memory,
        };
        Self {
            changing: tokio::sync::Mutex::default(),
            sizes: Mutex::new(sizes),
        }
    }

    /// The memory that the guest has, in bytes.
    pub(super) fn present(&self) -> u64 {
        self.sizes.lock().present
    }

    /// Begins a boot. The memory does not change before the result is dropped.
    pub(super) async fn begin_boot(&self) -> Booting<'_> {
        let changing = self.changing.lock().await;
        let mut sizes = self.sizes.lock();
        sizes.booted = sizes.present;
        Booting {
            memory: sizes.present,
            _changing: changing,
        }
    }

    /// Changes the size to `memory` bytes, in the guest too if it runs in the machine that `running` returns. The
    /// change is undone if it fails or the guest's kernel does not take part in time. Concurrent calls run one after the other.
    pub(super) async fn set(
        &self,
        running: impl FnOnce() -> Option<Arc<Machine>>,
        vcpus: u8,
        memory: u64,
    ) -> Result<(), MemoryError> {
        let _changing = self.changing.lock().await;
        let Sizes { booted, present } = *self.sizes.lock();
        if memory == present {
            return Ok(());
        }
        if let Some(machine) = running() {
            let added = |memory: u64| {
                memory
                    .checked_sub(booted)
                    .ok_or(MemoryError::TooSmall { memory, booted })
            };
            let (wanted, before) = (added(memory)?, added(present)?);
            let action = if memory > present { "add" } else { "remove" };
            let change = async {
                machine.resize(wanted, vcpus).await?;
                let settled = tokio::time::timeout(PLUG_LIMIT, machine.memory_plugged(wanted)).await;
                settled.map_err(|_| MemoryError::NotTaken { action })
            };
            if let Err(error) = change.await {
                // A slow vmm or guest could complete the change later, and then have another size than is recorded.
                if let Err(error) = machine.resize(before, vcpus).await {
                    log::warn!("cannot undo a change of the memory of a virtual machine: {error}");
                }
                return Err(error);
            }
        }
        self.sizes.lock().present = memory;
        Ok(())
    }
}

/// A boot in progress.
#[derive(Debug)]
pub(super) struct Booting<'m> {
    memory: u64,
    _changing: tokio::sync::MutexGuard<'m, ()>,
}

impl Booting<'_> {
    /// The memory with which the machine boots, in bytes.
    pub(super) fn memory(&self) -> u64 {
        self.memory
    }
}
