//! The state machine of the device status, and everything that a driver configures through it (virtio 1.3 §2.1, §2.2,
//! §3.1). It does not depend on the transport.
//!
//! It enforces these rules: features change only before FEATURES_OK; queues change only between FEATURES_OK and
//! DRIVER_OK; only a reset clears a status bit. After DRIVER_OK, nothing that was validated can change, because the
//! queues have moved to the device as values.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::memory::MemoryRegions;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The action that a status write requires of the transport.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    None,
    /// Reset the device.
    Reset,
    /// Activate the device. If that fails, call [`Negotiation::set_needs_reset`].
    Activate {
        /// The enabled queues, in order and without gaps, each validated against guest memory.
        queues: Vec<Queue>,
        /// The negotiated features.
        features: u64,
    },
    /// Report that the guest cannot use the device.
    Refuse(Refusal),
}

/// Why a device cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("its driver accepted a feature that was not offered, or did not accept VIRTIO_F_VERSION_1")]
    Features,
    #[error("its driver configured a queue that is invalid, or no queue")]
    Queues,
    #[error("its driver set the status bit FAILED")]
    Driver,
}

/// The configuration of a queue, which the driver sets, and its maximum size.
#[derive(Debug, Clone, Default)]
pub(crate) struct QueueConfig {
    max_size: u16,
    size: u16,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// An area of a queue, whose address the driver sets (virtio 1.3 §2.6).
#[derive(Debug, Clone, Copy)]
pub(crate) enum QueueArea {
    /// Descriptor area: the descriptor table.
    Descriptors,
    /// Driver area: the available ring.
    Driver,
    /// Device area: the used ring.
    Device,
}

/// The state of a device between reset and DRIVER_OK.
#[derive(Debug)]
pub(crate) struct Negotiation {
    status: u32,
    offered: u64,
    accepted: u64,
    queues: Vec<QueueConfig>,
}

impl Negotiation {
    /// The state after reset, of a device that offers the features `offered` and whose queues have at most `sizes`
    /// entries.
    pub(crate) fn new(offered: u64, sizes: &[u16]) -> Self {
        let queues = sizes
            .iter()
            .map(|&max_size| QueueConfig {
                max_size,
                size: max_size,
                ..QueueConfig::default()
            })
            .collect();
        Self {
            status: 0,
            offered,
            accepted: 0,
            queues,
        }
    }

    /// The status register.
    pub(crate) fn status(&self) -> u32 {
        self.status
    }

    /// The offered features.
    pub(crate) fn offered(&self) -> u64 {
        self.offered
    }

    /// Sets the low (`half` 0) or high (`half` 1) 32 bits of the features that the driver accepts (virtio 1.3 §4.2.2).
    pub(crate) fn accept_features(&mut self, half: u32, value: u32) {
        if self.status & DRIVER == 0 || self.status & (FEATURES_OK | FAILED) != 0 {
            return;
        }
        match half {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// The maximum size of queue `index`, or 0 if the queue does not exist.
    pub(crate) fn queue_max_size(&self, index: u32) -> u16 {
        self.queue(index).map_or(0, |queue| queue.max_size)
    }

    /// The size of queue `index` that the driver set, else its maximum; 0 if the queue does not exist.
    pub(crate) fn queue_size(&self, index: u32) -> u16 {
        self.queue(index).map_or(0, |queue| queue.size)
    }

    /// The address of an area of queue `index` that the driver set, else 0.
    pub(crate) fn queue_address(&self, index: u32, area: QueueArea) -> u64 {
        self.queue(index).map_or(0, |queue| match area {
            QueueArea::Descriptors => queue.descriptors,
            QueueArea::Driver => queue.driver,
            QueueArea::Device => queue.device,
        })
    }

    /// The features that the driver has accepted so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Queues that the driver has not enabled count too.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Whether the driver enabled queue `index`.
    pub(crate) fn is_queue_ready(&self, index: u32) -> bool {
        self.queue(index).is_some_and(|queue| queue.ready)
    }

    /// Sets a queue's size. Ignores a size that is not a power of two or exceeds the maximum.
    pub(crate) fn set_queue_size(&mut self, index: u32, size: u32) {
        if let Some(queue) = self.configurable_queue(index)
            && let Ok(size) = u16::try_from(size)
            && size.is_power_of_two()
            && size <= queue.max_size
        {
            queue.size = size;
        }
    }

    /// Sets the low or high 32 bits of the address of a queue's area.
    pub(crate) fn set_queue_address(&mut self, index: u32, area: QueueArea, high: bool, value: u32) {
        if let Some(queue) = self.configurable_queue(index) {
            let address = match area {
                QueueArea::Descriptors => &mut queue.descriptors,
                QueueArea::Driver => &mut queue.driver,
                QueueArea::Device => &mut queue.device,
            };
            *address = if high {
                *address & 0xffff_ffff | u64::from(value) << 32
            } else {
                *address & !0xffff_ffff | u64::from(value)
            };
        }
    }

    /// Enables or disables a queue.
    pub(crate) fn set_queue_ready(&mut self, index: u32, ready: bool) {
        let stage = self.status & (FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET);
        if stage == FEATURES_OK
            && let Some(queue) = self.queues.get_mut(index as usize)
        {
            queue.ready = ready;
        }
    }

    /// Handles a write to the status register.
    pub(crate) fn write_status(&mut self, value: u32, memory: &MemoryRegions) -> Transition {
        if value == 0 {
            let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
            *self = Self::new(self.offered, &sizes);
            return Transition::Reset;
        }
        let added = value & !self.status & 0xff;
        // A driver may write NEEDS_RESET back, which it has read, or leave it out.
        let stage = self.status & !NEEDS_RESET;
        if value & stage != stage || stage & FAILED != 0 {
            return Transition::None;
        }
        match (stage, added) {
            (_, FAILED) => {
                self.status |= FAILED;
                return Transition::Refuse(Refusal::Driver);
            }
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => self.status |= added,
            // Some drivers set both bits in one write.
            (0, both) if both == ACKNOWLEDGE | DRIVER => self.status |= both,
            (stage, FEATURES_OK) if stage == ACKNOWLEDGE | DRIVER => {
                let acceptable = self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
                if !acceptable {
                    return Transition::Refuse(Refusal::Features);
                }
                self.status |= FEATURES_OK;
            }
            (stage, DRIVER_OK) if stage == ACKNOWLEDGE | DRIVER | FEATURES_OK => {
                self.status |= DRIVER_OK;
                match self.build_queues(memory) {
                    Some(queues) => {
                        return Transition::Activate {
                            queues,
                            features: self.accepted,
                        };
                    }
                    None => {
                        self.set_needs_reset();
                        return Transition::Refuse(Refusal::Queues);
                    }
                }
            }
            _ => {}
        }
        Transition::None
    }

    /// Sets DEVICE_NEEDS_RESET: the device cannot continue until the driver resets it (virtio 1.3 §2.1.2).
    pub(crate) fn set_needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    fn queue(&self, index: u32) -> Option<&QueueConfig> {
        self.queues.get(index as usize)
    }

    /// Queue `index`, if the driver may change its size and addresses now.
    fn configurable_queue(&mut self, index: u32) -> Option<&mut QueueConfig> {
        let stage = self.status & (FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET);
        self.queues
            .get_mut(index as usize)
            .filter(|queue| stage == FEATURES_OK && !queue.ready)
    }

    /// Builds the enabled queues. Returns `None` if one is invalid, there is a gap, or there is no queue.
    fn build_queues(&self, memory: &MemoryRegions) -> Option<Vec<Queue>> {
        let event_idx = self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let count = self.queues.iter().take_while(|queue| queue.ready).count();
        let gap = self.queues[count..].iter().any(|queue| queue.ready);
        if count == 0 || gap {
            return None;
        }
        self.queues[..count]
            .iter()
            .map(|config| {
                let mut queue = Queue::new(config.max_size).ok()?;
                queue.try_set_size(config.size).ok()?;
                queue
                    .try_set_desc_table_address(GuestAddress(config.descriptors))
                    .ok()?;
                queue.try_set_avail_ring_address(GuestAddress(config.driver)).ok()?;
                queue.try_set_used_ring_address(GuestAddress(config.device)).ok()?;
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
                queue.is_valid(memory).then_some(queue)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::devices::virtio::device::COMMON_FEATURES;

    const UP_TO_FEATURES: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

    fn memory() -> MemoryRegions {
        MemoryRegions::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn configured(memory: &MemoryRegions) -> Negotiation {
        let mut state = Negotiation::new(COMMON_FEATURES, &[256, 256]);
        for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
            assert_eq!(state.write_status(status, memory), Transition::None);
        }
        state.accept_features(0, u32::try_from(COMMON_FEATURES & 0xffff_ffff).unwrap());
        state.accept_features(1, u32::try_from(COMMON_FEATURES >> 32).unwrap());
        state.write_status(UP_TO_FEATURES, memory);
        assert_eq!(state.status(), UP_TO_FEATURES);
        for index in 0..2 {
            state.set_queue_size(index, 16);
            state.set_queue_address(index, QueueArea::Descriptors, false, 0x1000);
            state.set_queue_address(index, QueueArea::Driver, false, 0x2000);
            state.set_queue_address(index, QueueArea::Device, false, 0x3000);
            state.set_queue_ready(index, true);
        }
        state
    }

    #[test]
    fn conforming_driver_activates_its_queues() {
        let memory = memory();
        let mut state = configured(&memory);

        let transition = state.write_status(UP_TO_FEATURES | DRIVER_OK, &memory);

        let Transition::Activate { queues, features } = transition else {
            panic!("{transition:?}");
        };
        assert_eq!(queues.len(), 2);
        assert!(
            queues
                .iter()
                .all(|queue| queue.size() == 16 && queue.event_idx_enabled())
        );
        assert_eq!(features, COMMON_FEATURES);
    }

    #[test]
    fn accepting_a_feature_that_was_not_offered_leaves_features_ok_clear() {
        let memory = memory();
        let mut state = Negotiation::new(COMMON_FEATURES, &[16]);
        state.write_status(ACKNOWLEDGE, &memory);
        state.write_status(ACKNOWLEDGE | DRIVER, &memory);
        state.accept_features(0, 1 << 5);
        state.accept_features(1, 1);
        state.write_status(UP_TO_FEATURES, &memory);
        assert_eq!(state.status(), ACKNOWLEDGE | DRIVER);
    }

    #[test]
    fn driver_without_version_1_cannot_set_features_ok() {
        let memory = memory();
        let mut state = Negotiation::new(COMMON_FEATURES, &[16]);
        state.write_status(ACKNOWLEDGE, &memory);
        state.write_status(ACKNOWLEDGE | DRIVER, &memory);
        state.write_status(UP_TO_FEATURES, &memory);
        assert_eq!(state.status(), ACKNOWLEDGE | DRIVER);
    }

    #[test]
    fn ready_queue_and_any_queue_after_driver_ok_cannot_be_reconfigured_cve_2026_5747() {
        let memory = memory();
        let mut state = configured(&memory);
        state.set_queue_size(0, 256);
        state.set_queue_address(0, QueueArea::Device, false, 0xf000);
        assert_eq!(state.queues[0].size, 16);
        assert_eq!(state.queues[0].device, 0x3000);
        state.write_status(UP_TO_FEATURES | DRIVER_OK, &memory);
        state.set_queue_ready(0, false);
        state.set_queue_size(0, 256);
        assert_eq!(state.queues[0].size, 16);
        assert!(state.is_queue_ready(0));
    }

    #[test]
    fn invalid_queues_set_needs_reset() {
        let memory = memory();
        type Damage = fn(&mut QueueConfig);
        let cases: [(&str, Damage); 5] = [
            ("not ready", |queue| queue.ready = false),
            ("beyond memory", |queue| queue.device = 0xffff_fff0),
            ("wraps the address space", |queue| queue.descriptors = u64::MAX - 15),
            ("misaligned", |queue| queue.descriptors = 0x1001),
            ("available ring crosses the end of memory", |queue| {
                queue.driver = 0xfffe
            }),
        ];
        for (name, damage) in cases {
            let mut state = configured(&memory);
            damage(&mut state.queues[0]);
            let transition = state.write_status(UP_TO_FEATURES | DRIVER_OK, &memory);
            assert_eq!(transition, Transition::Refuse(Refusal::Queues), "{name}");
            assert_ne!(state.status() & NEEDS_RESET, 0, "{name}");
        }
    }

    #[test]
    fn status_bits_cannot_be_skipped_or_cleared() {
        let memory = memory();
        let mut state = Negotiation::new(COMMON_FEATURES, &[16]);
        assert_eq!(
            state.write_status(UP_TO_FEATURES | DRIVER_OK, &memory),
            Transition::None
        );
        assert_eq!(state.status(), 0);
        state.write_status(ACKNOWLEDGE, &memory);
        state.write_status(ACKNOWLEDGE | DRIVER, &memory);
        state.write_status(DRIVER, &memory);
        assert_eq!(state.status(), ACKNOWLEDGE | DRIVER);
        assert_eq!(state.write_status(0, &memory), Transition::Reset);
        assert_eq!(state.status(), 0);
    }

    #[test]
    fn driver_can_give_up_a_device_that_needs_a_reset() {
        let memory = memory();
        for kept in [NEEDS_RESET, 0] {
            let mut state = configured(&memory);
            state.set_needs_reset();

            let transition = state.write_status(UP_TO_FEATURES | kept | FAILED, &memory);

            assert_eq!(transition, Transition::Refuse(Refusal::Driver), "{kept:#x}");
            assert_eq!(state.status(), UP_TO_FEATURES | NEEDS_RESET | FAILED, "{kept:#x}");
        }
    }

    #[test]
    fn invalid_queue_sizes_are_ignored() {
        let memory = memory();
        for size in [0, 3, 512, 0x1_0010] {
            let mut state = configured(&memory);
            state.queues[0].ready = false;
            state.set_queue_size(0, size);
            assert_eq!(state.queues[0].size, 16, "{size}");
        }
    }
}
