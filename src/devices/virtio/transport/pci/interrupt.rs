//! The interrupts of a device on the PCI transport: messages, of which the driver chooses one for each queue and one
//! for changes of the configuration (virtio 1.3 §4.1.5.1.2).

use std::{
    io,
    sync::atomic::{AtomicU16, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::interrupt::Interrupt;

/// `VIRTIO_MSI_NO_VECTOR`: no interrupt.
const NO_VECTOR: u16 = 0xffff;

/// The eventfd of each vector, and the vectors that the driver has chosen.
#[derive(Debug)]
pub(super) struct MessageInterrupt {
    events: Vec<EventFd>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl MessageInterrupt {
    /// No vector is chosen.
    pub(super) fn new(events: Vec<EventFd>, queue_count: usize) -> Self {
        Self {
            events,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queue_count).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    /// Sets the vector for changes of the configuration. A vector that does not exist reads back as [`NO_VECTOR`]: so
    /// the driver detects the refusal (virtio 1.3 §4.1.5.1.2).
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::SeqCst);
    }

    /// The vector of a queue; "no vector" if the queue does not exist.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets the vector of a queue, as [`Self::set_config_vector`] does.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(chosen) = self.queues.get(usize::from(queue)) {
            chosen.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// Sets all vectors to [`NO_VECTOR`].
    pub(super) fn reset(&self) {
        for chosen in self.queues.iter().chain([&self.config]) {
            chosen.store(NO_VECTOR, Ordering::SeqCst);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn signal(&self, vector: u16) {
        if let Some(event) = self.events.get(usize::from(vector)) {
            // Can fail only if a guest masks the vector for 2^64 interrupts.
            let _ = event.write(1);
        }
    }
}

impl Interrupt for MessageInterrupt {
    fn notify_used(&self, queue_index: u16) {
        self.signal(self.queue_vector(queue_index));
    }

    fn notify_config_change(&self) {
        self.signal(self.config_vector());
    }

    /// The eventfd of the queue's current vector. Without a vector the driver polls, so the eventfd is not
    /// connected.
    fn delegate(&self, queue_index: u16) -> io::Result<EventFd> {
        match self.events.get(usize::from(self.queue_vector(queue_index))) {
            Some(event) => event.try_clone(),
            None => EventFd::new(vmm_sys_util::eventfd::EFD_CLOEXEC | vmm_sys_util::eventfd::EFD_NONBLOCK),
        }
    }
}
