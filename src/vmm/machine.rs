//! A running machine: its devices, and the operations that change it.

use std::{os::fd::OwnedFd, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{
    disk_slots::DiskSlots,
    end_signal::EndSignal,
    error::{MachineError, device_error},
    growth::{Growth, GrowthContext},
    kvm::Vm,
    vcpu::Peripherals,
    wiring::{ReservedSlot, connect_to_kvm, create_kicks, eventfd},
};
use crate::{
    devices::virtio::{
        balloon::Balloon, block::Backing, console::Console, device::SharedDevice, fs::Fs, interrupt::InterruptLine,
        net::Net, rng::Rng, vsock::Vsock,
    },
    memory::GuestMemory,
};

/// A running machine. The event loop drives it.
#[derive(Debug)]
pub(super) struct RunningMachine {
    /// Must stay open while vCPUs run: closing the descriptor makes KVM release the irqfds.
    pub(super) vm: Vm,
    pub(super) memory: GuestMemory,
    pub(super) peripherals: Arc<Peripherals>,
    pub(super) end: Arc<EndSignal>,
    pub(super) network_slots: Vec<ReservedSlot>,
    pub(super) disk_slots: DiskSlots,
    pub(super) growth: Growth,
    pub(super) fs: Option<SharedDevice<Fs>>,
    pub(super) vsock: SharedDevice<Vsock>,
    pub(super) vsock_receive_kick: EventFd,
    pub(super) vsock_transmit_kick: EventFd,
    pub(super) console: SharedDevice<Console>,
    pub(super) console_transmit_kick: EventFd,
    pub(super) rng: SharedDevice<Rng>,
    pub(super) rng_kick: EventFd,
    pub(super) balloon: SharedDevice<Balloon>,
    pub(super) balloon_reporting_kick: EventFd,
}

impl RunningMachine {
    /// Plugs a network device into an empty slot. The guest finds it when it probes the slot again.
    pub(super) fn plug_network_device(
        &self,
        slot: u32,
        mac: [u8; 6],
        mtu: u16,
        queues: Vec<OwnedFd>,
    ) -> Result<(), MachineError> {
        let reserved = self.network_slots.get(slot as usize);
        let reserved = reserved
            .filter(|reserved| reserved.slot.is_empty())
            .ok_or(MachineError::Slot(slot))?;
        let net = Net::new(mac, mtu, queues).map_err(device_error("set up the queues of the tap device"))?;
        let (kicks, line) = (create_kicks(&net)?, Arc::new(InterruptLine::new(eventfd()?)));
        let transport = connect_to_kvm(&self.vm, &self.memory, reserved.address, Box::new(net), line, kicks)?;
        if reserved.slot.plug(transport) {
            Ok(())
        } else {
            Err(MachineError::Slot(slot))
        }
    }

    /// Plugs a disk into an empty disk slot. The guest finds it when it probes the slot again.
    pub(super) fn plug_disk(&mut self, slot: u32, backing: Backing) -> Result<(), MachineError> {
        self.disk_slots.plug(slot, backing, &self.vm, &self.memory)
    }

    /// Executes [`crate::control::Command::Resize`].
    pub(super) fn resize(&mut self, bytes: u64, vcpus: u8) -> Result<(), MachineError> {
        let context = GrowthContext {
            vm: &mut self.vm,
            memory: &self.memory,
            fs: self.fs.as_ref(),
            peripherals: &self.peripherals,
            end: &self.end,
        };
        self.growth.resize(bytes, vcpus, context)
    }
}
