//! The entry point of the fuzz target for the registers of the MMIO transport.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use arbitrary::{Result, Unstructured};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::{
    counters::Counters,
    virtio::{
        device::{ActivateError, Activation, COMMON_FEATURES, copy_config},
        fuzz::guest::{ADDED, Guest, HIGH, LOW},
    },
};

const MAX_STEPS: usize = 500;

/// The maximum sizes of the queues.
const SIZES: [u16; 3] = [16, 1, 256];

/// The features of the device that are not common to all.
const OWN_FEATURES: u64 = 1 << 5 | 1 << 40;

const CONFIG: &[u8] = b"configuration";

/// What the device has seen.
#[derive(Debug, Default)]
struct Seen {
    is_active: bool,
    generation: u32,
    /// The next activation fails.
    must_fail: bool,
    memory: Option<GuestMemory>,
}

/// A device that checks its activation.
#[derive(Debug, Clone, Default)]
struct Recorder(Arc<Mutex<Seen>>);

impl Device for Recorder {
    fn device_id(&self) -> u32 {
        1
    }

    fn counters(&self) -> Arc<Counters> {
        Counters::new("recorder")
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | OWN_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(CONFIG, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.0.lock().generation
    }

    fn activate(&mut self, activation: Activation) -> std::result::Result<(), ActivateError> {
        let mut seen = self.0.lock();
        assert!(!seen.is_active, "activated without a reset");
        assert_eq!(activation.features & !(COMMON_FEATURES | OWN_FEATURES), 0);
        assert_ne!(activation.features & 1 << VIRTIO_F_VERSION_1, 0);
        assert!((1..=SIZES.len()).contains(&activation.queues.len()));
        let memory = seen.memory.as_ref().unwrap();
        let is_memory = |address: u64, length: u64, alignment: u64| {
            assert_eq!(address % alignment, 0);
            assert!(is_in_memory(memory, address, length), "{address:#x} {length}");
        };
        for (queue, max_size) in activation.queues.iter().zip(SIZES) {
            let queue = queue.configuration();
            let size = u64::from(queue.size());
            assert!(size.is_power_of_two() && size <= u64::from(max_size));
            is_memory(queue.desc_table(), 16 * size, 16);
            is_memory(queue.avail_ring(), 6 + 2 * size, 2);
            is_memory(queue.used_ring(), 6 + 8 * size, 4);
        }
        if std::mem::take(&mut seen.must_fail) {
            return Err(ActivateError::Backend("the input says so".to_owned()));
        }
        seen.is_active = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.0.lock().is_active = false;
    }
}

/// Whether all of a range is memory, without the functions that the transport uses.
fn is_in_memory(memory: &GuestMemory, address: u64, length: u64) -> bool {
    let is_grown = vm_memory::GuestMemoryBackend::num_regions(memory.regions()) > 3;
    let end = u128::from(address) + u128::from(length);
    let inside = |start: u64, stop: u64| address >= start && end <= u128::from(stop);
    match is_grown {
        true => inside(LOW.start, HIGH.end),
        false => inside(LOW.start, LOW.end) || inside(HIGH.start, HIGH.end),
    }
}

/// Everything that a driver has configured.
#[derive(Debug, PartialEq, Eq)]
struct Configured {
    features: u64,
    queues: Vec<(u16, bool, [u64; 3])>,
}

struct Machine {
    guest: Guest,
    slot: HotplugSlot,
    seen: Arc<Mutex<Seen>>,
    line: Arc<InterruptLine>,
    /// The configuration at DRIVER_OK.
    frozen: Option<Configured>,
}

/// Interprets `data` as accesses to registers, configuration changes, growth of memory, and hot plug.
///
/// # Panics
///
/// If a device is activated with anything that the driver may not choose, or a register changes after that.
pub fn access_registers(data: &[u8]) {
    let input = &mut Unstructured::new(data);
    let mut machine = Machine::new();
    for _ in 0..MAX_STEPS {
        // The input may end anywhere.
        if input.is_empty() || machine.step(input).is_err() {
            break;
        }
        machine.check();
    }
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self {
            guest: Guest::new(),
            slot: HotplugSlot::default(),
            seen: Arc::default(),
            line: Arc::new(InterruptLine::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            frozen: None,
        };
        machine.plug();
        machine
    }

    fn plug(&mut self) {
        let recorder = Recorder::default();
        recorder.0.lock().memory = Some(self.guest.memory.clone());
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let line = Arc::new(InterruptLine::new(event()));
        let seen = recorder.0.clone();
        let kicks = SIZES.iter().map(|_| event()).collect();
        let device = Mmio::new(
            Box::new(recorder),
            self.guest.memory.clone(),
            line.clone(),
            kicks,
            0x1000,
        );
        if self.slot.plug(device) {
            (self.seen, self.line, self.frozen) = (seen, line, None);
        } else {
            assert!(!self.slot.is_empty());
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=15_u8)? {
            0..=5 => {
                let register = register(input)?;
                let value = match input.int_in_range(0..=3_u8)? {
                    0 => input.arbitrary()?,
                    1 => 1 << input.int_in_range(0..=31_u8)?,
                    _ => u32::from(input.arbitrary::<u8>()?),
                };
                self.write(register, value);
            }
            6 | 7 => {
                let size = *input.choose(&[1, 2, 4, 4, 4, 8, 16])?;
                let offset = u64::from(register(input)?) + u64::from(input.ratio(1_u8, 8)?);
                if input.arbitrary()? {
                    self.slot.clone().read(offset, &mut vec![0xee; size]);
                } else if size != 4 || offset % 4 != 0 {
                    let before = self.configured();
                    self.slot.clone().write(offset, input.bytes(size)?);
                    assert_eq!(self.configured(), before);
                }
            }
            8 | 9 => {
                // A conforming driver, up to some step.
                let steps = input.int_in_range(1..=40_usize)?;
                self.negotiate(steps, input.arbitrary()?);
            }
            10 => {
                let mut seen = self.seen.lock();
                seen.generation = seen.generation.wrapping_add(1);
                self.line.notify_config_change();
            }
            11 => self.line.notify_used(0),
            12 => drop(self.line.delegate(0).unwrap()),
            13 => self.seen.lock().must_fail = input.arbitrary()?,
            14 => {
                if input.ratio(1_u8, 4)? {
                    self.slot.unplug();
                    self.frozen = None;
                    assert!(self.slot.is_empty());
                    assert_eq!(self.read(VIRTIO_MMIO_DEVICE_ID), 0);
                }
                self.plug();
            }
            _ => self.guest.grow(),
        }
        Ok(())
    }

    /// Writes a register, and asserts what the write may change.
    fn write(&mut self, register: u32, value: u32) {
        let before = self.configured();
        let status = self.read(VIRTIO_MMIO_STATUS);
        self.slot.clone().write(register.into(), &value.to_le_bytes());
        let after = self.read(VIRTIO_MMIO_STATUS);
        let is_reset = register == VIRTIO_MMIO_STATUS && value == 0;
        if is_reset {
            assert_eq!(after, 0);
            assert!(!self.seen.lock().is_active);
            assert_eq!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
            self.frozen = None;
            return;
        }
        assert_eq!(after & status, status, "only a reset clears bits of the status");
        if register != VIRTIO_MMIO_STATUS {
            assert_eq!(after, status);
        }
        let configured = self.configured();
        if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let features = |of: &Option<Configured>| of.as_ref().map(|configured| configured.features);
            assert_eq!(features(&configured), features(&before));
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            let queues = |of: &Option<Configured>| of.as_ref().map(|configured| format!("{:?}", configured.queues));
            assert_eq!(queues(&configured), queues(&before));
        }
        if status & VIRTIO_CONFIG_S_DRIVER_OK == 0 && after & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.frozen = configured;
        }
    }

    fn check(&mut self) {
        let status = self.read(VIRTIO_MMIO_STATUS);
        let is_ok = status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK;
        if !self.slot.is_empty() {
            assert_eq!(self.seen.lock().is_active, is_ok);
        }
        if self.frozen.is_some() {
            assert_eq!(self.configured(), self.frozen);
        }
        let causes = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_eq!(causes & !(VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING), 0);
        let mut config = [0; 16];
        self.slot.clone().read(CONFIG_SPACE.start, &mut config);
        assert!(self.slot.is_empty() || config.starts_with(CONFIG));
    }

    fn configured(&self) -> Option<Configured> {
        let slot = self.slot.lock();
        let negotiation = &slot.as_ref()?.device.negotiation;
        let queue = |index| {
            let areas = [QueueArea::Descriptors, QueueArea::Driver, QueueArea::Device];
            let addresses = areas.map(|area| negotiation.queue_address(index, area));
            (
                negotiation.queue_size(index),
                negotiation.is_queue_ready(index),
                addresses,
            )
        };
        Some(Configured {
            features: negotiation.accepted(),
            queues: (0..3).map(queue).collect(),
        })
    }

    fn negotiate(&mut self, steps: usize, all_features: bool) {
        let features = if all_features {
            COMMON_FEATURES | OWN_FEATURES
        } else {
            COMMON_FEATURES
        };
        let mut writes = vec![
            (VIRTIO_MMIO_STATUS, 0),
            (VIRTIO_MMIO_STATUS, 1),
            (VIRTIO_MMIO_STATUS, 3),
            (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0),
            (VIRTIO_MMIO_DRIVER_FEATURES, super::super::half_of(features, 0)),
            (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            (VIRTIO_MMIO_DRIVER_FEATURES, super::super::half_of(features, 1)),
            (VIRTIO_MMIO_STATUS, 11),
        ];
        for queue in 0..3_u32 {
            let base = queue * 0x1000
                + if all_features {
                    0
                } else {
                    u32::try_from(ADDED.end).unwrap()
                };
            writes.extend([
                (VIRTIO_MMIO_QUEUE_SEL, queue),
                (VIRTIO_MMIO_QUEUE_NUM, 8 >> queue),
                (VIRTIO_MMIO_QUEUE_DESC_LOW, base),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400),
                (VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800),
                (VIRTIO_MMIO_QUEUE_READY, 1),
            ]);
        }
        writes.push((VIRTIO_MMIO_STATUS, 15));
        for (register, value) in writes.into_iter().take(steps) {
            self.write(register, value);
        }
    }

    fn read(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.slot.clone().read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// The offset of a register, or any offset.
fn register(input: &mut Unstructured<'_>) -> Result<u32> {
    Ok(if input.ratio(7_u8, 8)? {
        4 * u32::from(input.int_in_range(0..=0x41_u8)?)
    } else {
        input.arbitrary::<u32>()? & 0x1fff
    })
}
