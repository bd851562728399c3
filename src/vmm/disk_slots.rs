//! Slots for the disks of containers, which are plugged and unplugged while the machine runs.

use std::{io, sync::Arc};

use nutshell_protocol::disk_serial;
use vmm_sys_util::eventfd::EventFd;

use super::{
    error::{MachineError, device_error},
    kvm::Vm,
    wiring::{ReservedSlot, connect_to_kvm, create_kicks, eventfd},
};
use crate::{
    devices::{
        counters::Counters,
        stall_timer::StallTimer,
        virtio::{
            block::{Backing, Block},
            device::Device,
            interrupt::InterruptLine,
            mmio::{HotplugSlot, Mmio},
        },
    },
    memory::GuestMemory,
};

/// The disk slots that are reserved for hot-plugged disks.
#[derive(Debug)]
pub(super) struct DiskSlots {
    /// The number of the first slot. Lower numbers are the disks that the machine boots with.
    first: u32,
    slots: Vec<DiskSlot>,
    queues_per_disk: u16,
}

#[derive(Debug)]
struct DiskSlot {
    reserved: ReservedSlot,
    /// The eventfds that KVM has for this slot, registered with the first disk. Later disks use the same ones.
    events: Option<SlotEvents>,
    /// Those of its disk.
    counters: Option<Arc<Counters>>,
}

#[derive(Debug)]
struct SlotEvents {
    irqfd: EventFd,
    kicks: Vec<EventFd>,
}

impl DiskSlots {
    /// Empty slots, numbered from `first` on.
    pub(super) fn new(first: u32, reserved: Vec<ReservedSlot>, queues_per_disk: u16) -> Self {
        let slots = reserved.into_iter().map(|reserved| DiskSlot {
            reserved,
            events: None,
            counters: None,
        });
        Self {
            first,
            slots: slots.collect(),
            queues_per_disk,
        }
    }

    /// Plugs a disk on `backing` into the empty slot `slot`. The guest finds it when it probes the slot again.
    pub(super) fn plug(
        &mut self,
        slot: u32,
        backing: Backing,
        stall_timer: &Arc<StallTimer>,
        vm: &Vm,
        memory: &GuestMemory,
    ) -> Result<(), MachineError> {
        let queues = self.queues_per_disk;
        let found = self.index_of(slot).and_then(|index| self.slots.get_mut(index));
        let empty = found.filter(|slot| slot.reserved.slot.is_empty());
        let DiskSlot {
            reserved,
            events,
            counters,
        } = empty.ok_or(MachineError::Slot(slot))?;
        let block = Block::new(disk_serial(slot), backing, queues, stall_timer);
        let block = Box::new(block.map_err(device_error("set up the disk"))?);
        let new_counters = block.counters();
        let transport = if let Some(events) = events {
            let SlotEvents { irqfd, kicks } = events
                .try_clone()
                .map_err(device_error("duplicate an eventfd of a disk slot"))?;
            Mmio::new(block, memory.clone(), Arc::new(InterruptLine::new(irqfd)), kicks)
        } else {
            let new_events = SlotEvents {
                irqfd: eventfd()?,
                kicks: create_kicks(&*block)?,
            };
            let SlotEvents { irqfd, kicks } = new_events
                .try_clone()
                .map_err(device_error("duplicate an eventfd of a disk slot"))?;
            let line = Arc::new(InterruptLine::new(irqfd));
            let transport = connect_to_kvm(vm, memory, reserved.address, block, line, kicks)?;
            *events = Some(new_events);
            transport
        };
        if reserved.slot.plug(transport) {
            *counters = Some(new_counters);
            Ok(())
        } else {
            Err(MachineError::Slot(slot))
        }
    }

    /// Drops the counters of the disk in disk slot number `slot`, and returns the bus slot, from which the caller must
    /// unplug the disk; `None` if there is no such disk slot.
    pub(super) fn release(&mut self, slot: u32) -> Option<HotplugSlot> {
        let index = self.index_of(slot)?;
        let slot = self.slots.get_mut(index)?;
        slot.counters = None;
        Some(slot.reserved.slot.clone())
    }

    /// The counters of the disks in the slots.
    pub(super) fn counters(&self) -> impl Iterator<Item = &Arc<Counters>> {
        self.slots.iter().filter_map(|slot| slot.counters.as_ref())
    }

    fn index_of(&self, slot: u32) -> Option<usize> {
        usize::try_from(slot.checked_sub(self.first)?).ok()
    }
}

impl SlotEvents {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            irqfd: self.irqfd.try_clone()?,
            kicks: self.kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?,
        })
    }
}
