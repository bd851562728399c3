//! Guest memory, queues and an interrupt for the tests of devices.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use virtio_queue::{
    Queue,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{interrupt::Interrupt, queue::DeviceQueue};
use crate::{
    devices::stall_timer::StallTimer,
    memory::{GuestMemory, MemoryRegions},
};

/// Descriptor flags (virtio 1.3 §2.7.5). The constants of `virtio_bindings` are wider than the field.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Counts interrupts for used buffers.
#[derive(Debug, Default)]
pub(crate) struct InterruptCounter {
    pub(crate) used: AtomicUsize,
}

impl Interrupt for InterruptCounter {
    fn notify_used(&self, _queue_index: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn notify_config_change(&self) {}

    fn delegate(&self, _queue_index: u16) -> std::io::Result<EventFd> {
        EventFd::new(0)
    }
}

/// A timer for devices that do not wait.
pub(crate) fn stall_timer() -> Arc<StallTimer> {
    Arc::new(StallTimer::new().unwrap())
}

/// 1 MiB of guest memory.
pub(crate) fn memory() -> GuestMemory {
    GuestMemory::new(MemoryRegions::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
}

/// The device's side of `mock`.
pub(crate) fn device_queue(
    mock: &MockSplitQueue<'_, MemoryRegions>,
    memory: &GuestMemory,
) -> (DeviceQueue, Arc<InterruptCounter>) {
    let interrupts = Arc::new(InterruptCounter::default());
    let queue: Queue = mock.create_queue().unwrap();
    let kick = EventFd::new(0).unwrap();
    let queue = DeviceQueue::new(0, queue, kick, memory.clone(), interrupts.clone());
    (queue, interrupts)
}

pub(crate) fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, length, flags, next))
}
