//! The interface between a virtio device and its transport.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::{
    interrupt::Interrupt,
    queue::{DeviceQueue, QueueError},
};
use crate::{devices::counters::Counters, memory::GuestMemory};

/// The features that every device offers: virtio 1.x, and the two ring features that reduce VM exits.
pub(crate) const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device behind a transport.
///
/// ```text
/// new ──activate──▶ running ──reset──▶ new
/// ```
///
/// Only the transport calls these methods, while it holds its lock. A device with threads must stop them before `reset`
/// returns.
pub(crate) trait Device: Send {
    /// The device ID (virtio 1.3 §5).
    fn device_id(&self) -> u32;

    fn counters(&self) -> Arc<Counters>;

    /// The offered features, [`COMMON_FEATURES`] included.
    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    /// The maximum size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from the device's configuration at `offset`. Bytes beyond the end of the configuration read as
    /// zero. By default, the whole configuration is zero.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Must change whenever several configuration fields or a 64-bit field change (virtio 1.3 §2.5.3).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Whether the device interrupts its driver when its configuration changes. If not, a driver may treat each
    /// interrupt as one for used buffers.
    fn changes_configuration(&self) -> bool {
        false
    }

    /// Takes the queues and starts work.
    ///
    /// # Errors
    ///
    /// The transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops work and drops the queues.
    fn reset(&mut self);
}

/// A device that the transport and the vmm's event loop share. Each of them holds the lock for one register access or
/// one event.
#[derive(Debug)]
pub(crate) struct SharedDevice<D>(Arc<Mutex<D>>);

impl<D> SharedDevice<D> {
    pub(crate) fn new(device: D) -> Self {
        Self(Arc::new(Mutex::new(device)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, D> {
        self.0.lock()
    }
}

impl<D> Clone for SharedDevice<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Device> Device for SharedDevice<D> {
    fn device_id(&self) -> u32 {
        self.lock().device_id()
    }

    fn counters(&self) -> Arc<Counters> {
        self.lock().counters()
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

    fn changes_configuration(&self) -> bool {
        self.lock().changes_configuration()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.lock().activate(activation)
    }

    fn reset(&mut self) {
        self.lock().reset();
    }
}

/// Calls `serve`. If the guest has broken a queue, resets the device: the guest continues without it.
pub(crate) fn serve_or_reset<D: Device>(device: &mut D, serve: impl FnOnce(&mut D) -> Result<(), QueueError>) {
    if let Err(error) = serve(device) {
        let counters = device.counters();
        counters.add_error();
        log::warn!(target: counters.name(), "the guest continues without this device: {error}");
        device.reset();
    }
}

/// The resources that a device receives when its driver sets DRIVER_OK.
pub(crate) struct Activation {
    pub(crate) memory: GuestMemory,
    /// The negotiated features.
    pub(crate) features: u64,
    /// The queues that the driver enabled, in order and without gaps.
    pub(crate) queues: Vec<DeviceQueue>,
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
    /// Takes the queues as an array, for devices that need exactly `N`.
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
    #[error("the device's backend failed: {0}")]
    Backend(String),
    #[error(transparent)]
    Queue(QueueError),
    #[error("the driver enabled {found} queues, but the device needs {needed}")]
    QueueCount { found: usize, needed: usize },
    #[error("the driver placed a part of a queue at {0:#x}, where it has no memory")]
    QueueAddress(u64),
    #[error("the driver set up the device again, which is possible only once")]
    SecondActivation,
}

/// Copies the part of `config` at `offset` into `data`. Bytes beyond the end of `config` are zero.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let available = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    if let Some(available) = available {
        let length = available.len().min(data.len());
        data[..length].copy_from_slice(&available[..length]);
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::devices::{
        console_tail::ConsoleTail,
        log_capture::LogCapture,
        virtio::{
            balloon::Balloon,
            console::Console,
            mem::Mem,
            mock::{InterruptCounter, device_queue, memory},
            rng::Rng,
        },
    };

    /// Activates `device`, whose queue `broken` of `count` has an invalid available index, and serves it.
    fn break_queue<D: Device>(
        mut device: D,
        count: u64,
        broken: u64,
        serve: impl FnOnce(&mut D) -> Result<(), QueueError>,
    ) -> (Vec<String>, u64) {
        let counters = device.counters();
        let log = LogCapture::on_this_thread(counters.name());
        let memory = memory();
        let queues = (0..count).map(|index| {
            let mock = MockSplitQueue::create(&*memory, GuestAddress(index * 0x1000), 16);
            mock.avail().idx().store(if index == broken { 17 } else { 0 });
            device_queue(&mock, &memory).0
        });
        let activation = Activation {
            features: device.features(),
            queues: queues.collect(),
            interrupt: Arc::new(InterruptCounter::default()),
            memory: memory.clone(),
        };
        device.activate(activation).unwrap();

        serve_or_reset(&mut device, serve);

        (log.lines(), counters.read().errors)
    }

    #[test]
    fn broken_queue_of_each_device_of_the_event_loop_is_logged_and_counted_once() {
        let tail = Arc::new(ConsoleTail::default());
        let region = 4 << 30..5 << 30;
        for (name, outcome) in [
            ("console", break_queue(Console::new(tail), 2, 1, Console::serve)),
            ("rng", break_queue(Rng::default(), 1, 0, Rng::serve)),
            ("balloon", break_queue(Balloon::new(false), 3, 2, Balloon::serve)),
            (
                "balloon",
                break_queue(Balloon::new(true), 4, 2, |balloon| balloon.serve_statistics().map(drop)),
            ),
            ("mem", break_queue(Mem::new(region), 1, 0, Mem::serve)),
        ] {
            let (lines, errors) = outcome;
            let [line] = &lines[..] else {
                panic!("{name}: {lines:?}")
            };
            let expected = "the guest continues without this device: queue 0: the virtqueue is broken";
            assert!(line.starts_with(expected), "{name}: {line}");
            assert_eq!(errors, 1, "{name}");
        }
    }
}
