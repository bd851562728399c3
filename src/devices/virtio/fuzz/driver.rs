//! A driver on the MMIO transport, whose actions the input of a fuzz target selects.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{ADDED, Guest, HIGH, LOW, MAX_QUEUE_SIZE, QUEUE_STRIDE, Request, Ring};
use crate::devices::{
    bus::Registers,
    virtio::{
        device::Device,
        transport::mmio::{InterruptLine, Mmio},
    },
};

/// The maximum number of actions of an input.
const MAX_STEPS: usize = 300;

/// A device and its surroundings on the host, as a fuzz target drives them.
pub(crate) trait Subject {
    /// A request that the device may understand, for queue `queue`.
    fn request(&mut self, input: &mut Unstructured<'_>, queue: usize) -> Result<Request>;

    /// Handles a kick of queue `queue`.
    fn serve(&mut self, queue: usize);

    /// Does what the host may do at any time.
    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()>;

    /// Asserts what must hold after each action.
    fn check(&mut self, _driver: &Driver) {}
}

const NOTIFY_PORT: u16 = 0x1000;

/// A driver and its guest.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) guest: Guest,
    pub(crate) transport: Mmio,
    pub(crate) rings: Vec<Ring>,
}

impl Driver {
    /// The driver of `device`, whose queues are signalled by `kicks`.
    pub(crate) fn new(device: Box<dyn Device>, kicks: Vec<EventFd>) -> Self {
        let guest = Guest::new();
        let sizes = device.queue_sizes();
        let line = Arc::new(InterruptLine::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        Self {
            transport: Mmio::new(device, guest.memory.clone(), line, kicks, NOTIFY_PORT),
            rings: rings(&sizes, LOW.start),
            guest,
        }
    }

    /// Eventfds for the queues of `device`.
    pub(crate) fn kicks(device: &dyn Device) -> Vec<EventFd> {
        let kicks = device.queue_sizes().into_iter();
        kicks.map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect()
    }

    /// Lets `subject` and its driver act as the input says.
    pub(crate) fn run(&mut self, input: &mut Unstructured<'_>, subject: &mut impl Subject) {
        // The input may end anywhere.
        if self.start(input).is_err() {
            return;
        }
        for _ in 0..MAX_STEPS {
            if input.is_empty() || self.step(input, subject).is_err() {
                break;
            }
            subject.check(self);
        }
        self.write_register(VIRTIO_MMIO_STATUS, 0);
        subject.check(self);
    }

    fn step(&mut self, input: &mut Unstructured<'_>, subject: &mut impl Subject) -> Result<()> {
        let queue = input.int_in_range(0..=self.rings.len() - 1)?;
        match input.int_in_range(0..=15_u8)? {
            0..=4 => {
                let request = subject.request(input, queue)?;
                self.rings[queue].send(&mut self.guest, input, &request)?;
                if input.ratio(3_u8, 4)? {
                    subject.serve(queue);
                }
            }
            5..=7 => subject.serve(queue),
            8..=10 => subject.act_on_host(input)?,
            11 => self.rings[queue].damage(&mut self.guest, input)?,
            12 => {
                let index = self.rings[queue].used_index(&self.guest);
                self.rings[queue].write_used_event(&self.guest, index);
                self.write_register(VIRTIO_MMIO_INTERRUPT_ACK, 3);
            }
            13 => {
                let offset = u64::from(VIRTIO_MMIO_CONFIG) + u64::from(input.arbitrary::<u8>()? & 0x7f);
                let mut bytes = vec![0; *input.choose(&[1, 2, 4, 8])?];
                self.transport.read(offset, &mut bytes);
                self.transport.write(offset, &bytes);
            }
            14 => self.guest.grow(),
            _ => self.start(input)?,
        }
        Ok(())
    }

    /// Resets the device, and negotiates up to DRIVER_OK.
    fn start(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let base = *input.choose(&[
            LOW.start,
            LOW.start,
            LOW.start,
            HIGH.start,
            ADDED.start,
            LOW.end - 0x180,
        ])?;
        let sizes: Vec<_> = self.rings.iter().map(|ring| ring.size).collect();
        self.rings = rings(&sizes, base);
        // Rings of an earlier start contain other indices.
        for ring in &self.rings {
            self.guest.write(ring.base, &[0; QUEUE_STRIDE]);
        }
        let mask = if input.ratio(3_u8, 4)? {
            u64::MAX
        } else {
            input.arbitrary::<u64>()? | 1 << 32
        };
        let count = if input.ratio(7_u8, 8)? {
            usize::MAX
        } else {
            input.int_in_range(0..=self.rings.len())?
        };
        self.negotiate(mask, count);
        Ok(())
    }

    /// Accepts the offered features that are in `mask`, and sets up `count` queues.
    pub(crate) fn negotiate(&mut self, mask: u64, count: usize) {
        for status in [0, 1, 3] {
            self.write_register(VIRTIO_MMIO_STATUS, status);
        }
        for half in [0, 1] {
            self.write_register(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.read_register(VIRTIO_MMIO_DEVICE_FEATURES);
            let accepted = offered & u32::try_from(mask >> (32 * half) & 0xffff_ffff).unwrap();
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES, accepted);
        }
        self.write_register(VIRTIO_MMIO_STATUS, 11);
        let rings: Vec<_> = self.rings.iter().take(count).cloned().collect();
        for (index, ring) in (0..).zip(&rings) {
            self.write_register(VIRTIO_MMIO_QUEUE_SEL, index);
            self.write_register(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
            for (register, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.base),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available_ring()),
                (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used_ring()),
            ] {
                self.write_register(register, u32::try_from(address).unwrap());
                self.write_register(register + 4, 0);
            }
            self.write_register(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.write_register(VIRTIO_MMIO_STATUS, 15);
    }

    pub(crate) fn read_register(&mut self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write_register(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }
}

fn rings(sizes: &[u16], base: u64) -> Vec<Ring> {
    let sizes = sizes.iter().zip(0..);
    let rings = sizes.map(|(size, index)| Ring::new(base + index * QUEUE_STRIDE as u64, (*size).min(MAX_QUEUE_SIZE)));
    rings.collect()
}
