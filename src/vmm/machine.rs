//! A running machine, and what is added to it while it runs.

use std::{os::fd::OwnedFd, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{
    disk_slots::DiskSlots,
    end::End,
    error::{BuildError, device},
    growth::{Growth, GrowthContext},
    kvm::Vm,
    vcpu::Peripherals,
    wiring::{ReservedSlot, connect, eventfd, kicks_of},
};
use crate::{
    devices::virtio::{
        Handle,
        balloon::Balloon,
        block::Backing,
        console::Console,
        fs::Fs,
        mmio::{HotplugSlot, InterruptLine},
        net::Net,
        rng::Rng,
        vsock::Vsock,
    },
    memory::GuestMemory,
};

/// A running machine, as the event loop drives it.
#[derive(Debug)]
pub(crate) struct RunningMachine {
    /// KVM takes the irqfds back when its descriptor is closed, while vCPUs still run.
    pub(super) vm: Vm,
    pub(super) memory: GuestMemory,
    pub(super) peripherals: Arc<Peripherals>,
    pub(super) end: Arc<End>,
    /// Places for network devices.
    pub(super) links: Vec<ReservedSlot>,
    pub(super) disk_slots: DiskSlots,
    pub(super) growth: Growth,
    pub(super) fs: Option<Handle<Fs>>,
    pub(crate) vsock: Handle<Vsock>,
    pub(crate) vsock_receive: EventFd,
    pub(crate) vsock_transmit: EventFd,
    pub(crate) console: Handle<Console>,
    pub(crate) console_transmit: EventFd,
    pub(crate) rng: Handle<Rng>,
    pub(crate) rng_request: EventFd,
    pub(crate) balloon: Handle<Balloon>,
    pub(crate) balloon_report: EventFd,
}

impl RunningMachine {
    /// Puts a network device into an empty slot; the guest's driver finds it when it looks again.
    pub(crate) fn plug_link(&self, slot: u32, mac: [u8; 6], mtu: u16, queues: Vec<OwnedFd>) -> Result<(), BuildError> {
        let place = self.links.get(slot as usize).filter(|place| place.slot.is_empty());
        let place = place.ok_or(BuildError::Slot(slot))?;
        let net = Net::new(mac, mtu, queues).map_err(device("tap device"))?;
        let (kicks, line) = (kicks_of(&net)?, Arc::new(InterruptLine::new(eventfd()?)));
        let transport = connect(&self.vm, &self.memory, place.address, Box::new(net), line, kicks)?;
        if place.slot.fill(transport) {
            Ok(())
        } else {
            Err(BuildError::Slot(slot))
        }
    }

    /// Puts a disk into an empty disk slot, in the same way.
    pub(crate) fn plug_disk(&mut self, slot: u32, backing: Backing) -> Result<(), BuildError> {
        self.disk_slots.plug(slot, backing, &self.vm, &self.memory)
    }

    /// Forgets the disk in a slot; what is returned is to be emptied, and another may have the slot then.
    pub(crate) fn forget_disk(&mut self, slot: u32) -> Option<HotplugSlot> {
        self.disk_slots.place(slot)
    }

    /// See [`control::Command::Resize`].
    pub(crate) fn resize(&mut self, bytes: u64, vcpus: u8) -> Result<(), BuildError> {
        let context = GrowthContext {
            vm: &mut self.vm,
            memory: &self.memory,
            fs: self.fs.as_ref(),
            peripherals: &self.peripherals,
            end: &self.end,
        };
        self.growth.resize(bytes, vcpus, context)
    }

    /// The same, to change it.
    pub(crate) fn growth_mut(&mut self) -> &mut Growth {
        &mut self.growth
    }

    /// What can be added while the machine runs.
    pub(crate) fn growth(&self) -> &Growth {
        &self.growth
    }
}
