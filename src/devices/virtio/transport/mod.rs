//! Transports: how a driver finds a device, negotiates with it, and sets up its queues (virtio 1.3 §4).
//!
//! Belongs here: [`mmio`] and [`pci`], the two transports; [`negotiation`], the state machine of device status and
//! features, which they share; and [`NegotiatedDevice`], which executes its transitions. Does not belong here: anything
//! about KVM, or about one kind of device. The vmm creates transports, and vCPU threads call them.
//!
//! A transport owns everything that a driver may change. When the driver sets DRIVER_OK, the queues move to the device
//! as immutable values ([`DeviceQueue`]); the transport keeps none.

pub(crate) mod mmio;
pub(crate) mod negotiation;
pub(crate) mod pci;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::negotiation::{Negotiation, Refusal, Transition};
use super::{
    device::{ActivateError, Activation, Device},
    interrupt::Interrupt,
    queue::DeviceQueue,
};
use crate::memory::GuestMemory;

/// A device with the state of its negotiation, which a transport makes accessible to the driver.
struct NegotiatedDevice {
    device: Box<dyn Device>,
    negotiation: Negotiation,
    memory: GuestMemory,
    kicks: Vec<EventFd>,
    interrupt: Arc<dyn Interrupt>,
}

impl NegotiatedDevice {
    /// `kicks` has one eventfd per queue, which is signalled when the driver notifies the queue.
    fn new(device: Box<dyn Device>, memory: GuestMemory, kicks: Vec<EventFd>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            negotiation: Negotiation::new(device.features(), &device.queue_sizes()),
            device,
            memory,
            kicks,
            interrupt,
        }
    }

    /// Half `half` of the offered features: 0 for the low 32 bits, 1 for the high ones.
    fn offered_features(&self, half: u32) -> u32 {
        half_of(self.negotiation.offered(), half)
    }

    /// Handles a write to the status register. Returns `true` if it resets the device, whose interrupt the transport
    /// must then reset as well.
    #[must_use]
    fn write_status(&mut self, value: u32) -> bool {
        match self.negotiation.write_status(value, &self.memory) {
            Transition::None => {}
            Transition::Reset => {
                self.device.reset();
                return true;
            }
            Transition::Activate { queues, features } => {
                if let Err(error) = self.activate(queues, features) {
                    self.report_unusable(&error);
                    self.negotiation.set_needs_reset();
                    self.interrupt.notify_config_change();
                }
            }
            Transition::Refuse(refusal) => {
                self.report_unusable(&refusal);
                // After DRIVER_OK, the driver must be notified that the device needs a reset (virtio 1.3 §2.1.2).
                if refusal == Refusal::Queues {
                    self.interrupt.notify_config_change();
                }
            }
        }
        false
    }

    /// Counts and logs that the guest cannot use the device, which needs a reset.
    fn report_unusable(&self, reason: &dyn std::fmt::Display) {
        let counters = self.device.counters();
        counters.add_error();
        log::warn!(target: counters.name(), "the guest cannot use this device: {reason}");
    }

    fn activate(&mut self, queues: Vec<virtio_queue::Queue>, features: u64) -> Result<(), ActivateError> {
        let queues = queues
            .into_iter()
            .zip(&self.kicks)
            .zip(0..)
            .map(|((queue, kick), index)| {
                let kick = kick.try_clone().map_err(|error| {
                    ActivateError::Backend(format!("queue {index}: cannot duplicate its eventfd: {error}"))
                })?;
                Ok(DeviceQueue::new(
                    index,
                    queue,
                    kick,
                    self.memory.clone(),
                    self.interrupt.clone(),
                ))
            })
            .collect::<Result<Vec<_>, ActivateError>>()?;
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.device.activate(activation)
    }
}

impl std::fmt::Debug for NegotiatedDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NegotiatedDevice")
            .field("device_id", &self.device.device_id())
            .field("negotiation", &self.negotiation)
            .finish_non_exhaustive()
    }
}

/// The low (`half` 0) or high (`half` 1) 32 bits of `value`. Other halves are zero.
fn half_of(value: u64, half: u32) -> u32 {
    match half {
        0 => (value & 0xffff_ffff) as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
