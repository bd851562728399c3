//! Interrupts from a device to its driver.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Notifies the driver, on any transport (virtio 1.3 §2.3).
pub(crate) trait Interrupt: Send + Sync {
    /// Notifies the driver that the device has used buffers of queue `queue_index`.
    fn notify_used(&self, queue_index: u16);

    /// Notifies the driver that the device's configuration has changed.
    fn notify_config_change(&self);

    /// Returns an eventfd by which another process notifies the driver of used buffers of queue `queue_index`, in place
    /// of [`Self::notify_used`]. It is valid until the driver resets the device.
    fn delegate(&self, queue_index: u16) -> io::Result<EventFd>;
}
