//! Virtio 1.3: negotiation, queues, the MMIO transport and the devices.
//!
//! The transport ([`mmio`]) owns what a driver may change; once the driver says DRIVER_OK, the
//! device gets its queues as immutable values ([`queue::DeviceQueue`]) and the transport keeps none
//! of them. [`negotiation`] holds the one state machine that every transport drives.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod buffers;
pub(crate) mod console;
pub(crate) mod fs;
pub(crate) mod mem;
pub(crate) mod mmio;
pub(crate) mod negotiation;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod vsock;

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use self::queue::DeviceQueue;
use crate::memory::GuestMemory;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

/// What every device offers: the standard's version and both ring features that save exits.
pub(crate) const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How a device tells its driver that something happened, whatever the transport.
pub(crate) trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used (virtio 1.3 §2.3).
    fn used(&self, index: u16);

    /// The device's configuration changed (virtio 1.3 §2.3).
    fn config_changed(&self);
}

/// A virtio device behind some transport.
///
/// ```text
/// new ──activate──▶ running ──reset──▶ new
/// ```
///
/// Only the transport calls it, under its lock. A device that does its work on another thread
/// stops that work before `reset` returns.
pub(crate) trait Device: Send {
    /// The device id (virtio 1.3 §5).
    fn kind(&self) -> u32;

    /// The features offered, [`COMMON_FEATURES`] included.
    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from the device's configuration at `offset`; bytes beyond its end read as zero. The default is a
    /// device without a configuration.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Changes with every change of the configuration that spans several fields or a field of 64 bits
    /// (virtio 1.3 §2.5.3).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Takes the queues and starts to work.
    ///
    /// # Errors
    ///
    /// The transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops work and gives up the queues.
    fn reset(&mut self);
}

/// A device that the transport and the vmm's event loop share. The lock is held for one register
/// access or one event at a time.
#[derive(Debug)]
pub(crate) struct Handle<D>(Arc<Mutex<D>>);

impl<D> Handle<D> {
    /// Makes `device` shareable.
    pub(crate) fn new(device: D) -> Self {
        Self(Arc::new(Mutex::new(device)))
    }

    /// Exclusive use of the device.
    pub(crate) fn lock(&self) -> MutexGuard<'_, D> {
        // A panic ends the process (see `vmm::main`): nobody sees a poisoned lock.
        self.0.lock()
    }
}

impl<D> Clone for Handle<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Device> Device for Handle<D> {
    fn kind(&self) -> u32 {
        self.lock().kind()
    }

    fn features(&self) -> u64 {
        self.lock().features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.lock().queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.lock().read_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.lock().config_generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.lock().activate(activation)
    }

    fn reset(&mut self) {
        self.lock().reset();
    }
}

/// All that a device gets when its driver is ready.
pub(crate) struct Activation {
    /// Guest memory.
    pub(crate) memory: GuestMemory,
    /// The features that both sides agreed on.
    pub(crate) features: u64,
    /// The queues that the driver set up, in order, without a gap.
    pub(crate) queues: Vec<DeviceQueue>,
    /// How to interrupt the driver.
    pub(crate) interrupt: Arc<dyn Interrupt>,
}

impl std::fmt::Debug for Activation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Activation")
            .field("features", &self.features)
            .field("queues", &self.queues.len())
            .finish_non_exhaustive()
    }
}

impl Activation {
    /// The queues as an array, for devices that need exactly `N`.
    pub(crate) fn take_queues<const N: usize>(&mut self) -> Result<[DeviceQueue; N], ActivateError> {
        let queues = std::mem::take(&mut self.queues);
        let found = queues.len();
        queues
            .try_into()
            .map_err(|_| ActivateError::QueueCount { found, needed: N })
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActivateError {
    /// The device's backend failed.
    #[error("the device's backend failed: {0}")]
    Backend(String),
    /// The driver set up too few or too many queues.
    #[error("the driver set up {found} queues where the device needs {needed}")]
    QueueCount {
        /// How many it set up.
        found: usize,
        /// How many there must be.
        needed: usize,
    },
}

/// Copies the part of `config` at `offset` into `data`; beyond its end stand zeroes.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    if let Some(rest) = rest {
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }
}
