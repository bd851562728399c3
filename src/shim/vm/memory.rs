//! Changes of the memory of a virtual machine while its guest runs.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::{
    oci::ContainerId,
    shim::machine::{Machine, VmmError},
};

/// How long the guest's kernel may take to add or remove memory.
const PLUG_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// How long the guest may take to bring memory online that its driver has added. In some distributions, udev does this.
const ONLINE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// The interval at which the guest is asked how much memory is online.
const ONLINE_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Why the memory cannot be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error(
        "the limit of {} MiB is less than {} MiB, with which the virtual machine has booted: it never has less",
        memory >> 20,
        booted >> 20
    )]
    TooSmall { memory: u64, booted: u64 },
    #[error("the guest's kernel did not {action} the memory within {} s: {reason}", PLUG_LIMIT.as_secs())]
    NotChanged { action: &'static str, reason: String },
    #[error(
        "the guest's kernel has added the memory, but leaves it offline and does not use it: write online_movable to \
         /sys/devices/system/memory/auto_online_blocks in the guest, or boot it with memhp_default_state=online_movable"
    )]
    Offline,
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
    /// The memory that it has now, and with which it boots next.
    current: u64,
}

impl MachineMemory {
    /// The memory of a machine that will boot with `memory` bytes.
    pub(super) fn new(memory: u64) -> Self {
        let sizes = Sizes {
            booted: 0,
            current: memory,
        };
        Self {
            changing: tokio::sync::Mutex::default(),
            sizes: Mutex::new(sizes),
        }
    }

    /// The memory that the guest has, in bytes.
    pub(super) fn current(&self) -> u64 {
        self.sizes.lock().current
    }

    /// Begins a boot. The memory does not change before the result is dropped.
    pub(super) async fn begin_boot(&self) -> Booting<'_> {
        let changing = self.changing.lock().await;
        let mut sizes = self.sizes.lock();
        sizes.booted = sizes.current;
        Booting {
            memory: sizes.current,
            _changing: changing,
        }
    }

    /// Changes the size to `memory` bytes, in the guest too if it runs in the machine that `running` returns. The
    /// change is undone if it fails, or if the guest's kernel does not add or remove the memory in time. Concurrent
    /// calls run one after the other.
    pub(super) async fn set(
        &self,
        id: &ContainerId,
        running: impl FnOnce() -> Option<Arc<Machine>>,
        vcpus: u8,
        memory: u64,
    ) -> Result<(), MemoryError> {
        let _changing = self.changing.lock().await;
        let Sizes { booted, current } = *self.sizes.lock();
        if memory == current {
            return Ok(());
        }
        if let Some(machine) = running() {
            let added = |memory: u64| {
                memory
                    .checked_sub(booted)
                    .ok_or(MemoryError::TooSmall { memory, booted })
            };
            let (wanted, before) = (added(memory)?, added(current)?);
            let action = if memory > current { "add" } else { "remove" };
            let change = async {
                let online_before = match memory > current {
                    true => online_memory(&machine).await?,
                    false => None,
                };
                machine.resize(wanted, vcpus).await?;
                let settled = tokio::time::timeout(PLUG_LIMIT, machine.memory_plugged(wanted)).await;
                if settled.is_err() {
                    let reason = reason_for_no_change(&machine, wanted).await;
                    return Err(MemoryError::NotChanged { action, reason });
                }
                match online_before {
                    // The kernel needs a part of the memory for itself.
                    Some(online) => wait_until_online(&machine, online.saturating_add((memory - current) / 2)).await,
                    None => Ok(()),
                }
            };
            if let Err(error) = change.await {
                // A slow vmm or guest could complete the change later, and then have another size than is recorded.
                if let Err(error) = machine.resize(before, vcpus).await {
                    log::warn!(
                        "task {id}: the guest may keep {} MiB instead of {} MiB: cannot undo a change of its memory: \
                         {error}",
                        memory >> 20,
                        current >> 20
                    );
                }
                return Err(error);
            }
        }
        self.sizes.lock().current = memory;
        Ok(())
    }
}

/// How much memory is online in the guest, in bytes. `None` if the guest does not report it.
async fn online_memory(machine: &Machine) -> Result<Option<u64>, VmmError> {
    match machine.guest_memory().await {
        Ok(state) => Ok(state.total),
        Err(VmmError::Timeout(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until `needed` bytes are online in the guest: its driver can add memory that the kernel leaves offline.
async fn wait_until_online(machine: &Machine, needed: u64) -> Result<(), MemoryError> {
    let is_online = async {
        while online_memory(machine).await?.is_none_or(|online| online < needed) {
            tokio::time::sleep(ONLINE_POLL_INTERVAL).await;
        }
        Ok(())
    };
    let is_online = tokio::time::timeout(ONLINE_LIMIT, is_online).await;
    is_online.unwrap_or(Err(MemoryError::Offline))
}

/// Why the guest does not have `wanted` bytes beyond its boot memory.
async fn reason_for_no_change(machine: &Machine, wanted: u64) -> String {
    match machine.guest_memory().await {
        Ok(state) if !state.has_driver => "its driver virtio_mem is not loaded".to_owned(),
        Ok(state) => format!(
            "its driver has added {} MiB instead of {} MiB. It can remove only memory that is not in use",
            state.plugged >> 20,
            wanted >> 20
        ),
        Err(_) => "it needs the driver virtio_mem, and it can remove only memory that is not in use".to_owned(),
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
