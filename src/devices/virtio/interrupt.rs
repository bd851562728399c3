//! Interrupts from a device to its driver.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// Notifies the driver, on any transport (virtio 1.3 §2.3).
pub(crate) trait Interrupt: Send + Sync {
    /// Notifies the driver that the device has used buffers of queue `queue_index`.
    fn notify_used(&self, queue_index: u16);

    /// Notifies the driver that the device's configuration has changed.
    fn notify_config_change(&self);
}

/// A bit of [`InterruptLine::status`] that drivers do not see. If it is set, the status register always reports used
/// buffers.
const ALWAYS_USED: u32 = 1 << 31;

/// The bits of the status register that a driver can acknowledge.
const ACKNOWLEDGEABLE: u32 = 0xff;

/// The interrupt of a device on the MMIO transport: an interrupt status register (virtio 1.3 §4.2.2) and an irqfd.
#[derive(Debug)]
pub(crate) struct InterruptLine {
    status: AtomicU32,
    irqfd: EventFd,
}

impl InterruptLine {
    /// A line that KVM raises when `irqfd` is written.
    pub(crate) fn new(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            irqfd,
        }
    }

    /// A line whose status register always reports used buffers. For a device whose backend is in another process: the
    /// backend writes to the irqfd itself but cannot set the status. A driver ignores an interrupt without used buffers
    /// (virtio 1.3 §2.7.7).
    pub(crate) fn always_used(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(ALWAYS_USED),
            irqfd,
        }
    }

    pub(crate) fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// The status register as the driver reads it.
    pub(super) fn status(&self) -> u32 {
        let status = self.status.load(Ordering::SeqCst);
        if status & ALWAYS_USED == 0 {
            status
        } else {
            status & !ALWAYS_USED | VIRTIO_MMIO_INT_VRING
        }
    }

    /// Clears `causes` in the status register.
    pub(super) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!(causes & ACKNOWLEDGEABLE), Ordering::SeqCst);
    }

    /// Clears the status register.
    pub(super) fn reset(&self) {
        self.acknowledge(ACKNOWLEDGEABLE);
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // The counter cannot overflow: each write adds one, and KVM reads it.
        let _ = self.irqfd.write(1);
    }
}

impl Interrupt for InterruptLine {
    fn notify_used(&self, _queue_index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn notify_config_change(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}
