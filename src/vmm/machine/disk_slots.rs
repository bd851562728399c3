//! Slots for the disks of containers, which are plugged and unplugged while the machine runs.

use std::sync::Arc;

use nutshell_protocol::disk_serial;

use crate::devices::{
    counters::Counters,
    stall_timer::StallTimer,
    virtio::{
        block::{Backing, Block},
        device::Device,
    },
};
use crate::vmm::{
    board::{Slot, create_kicks},
    error::{MachineError, device_error},
};

/// The disk slots that are reserved for hot-plugged disks.
#[derive(Debug)]
pub(in crate::vmm) struct DiskSlots {
    /// The number of the first slot. Lower numbers are the disks that the machine boots with.
    first: u32,
    slots: Vec<DiskSlot>,
    queues_per_disk: u16,
}

#[derive(Debug)]
struct DiskSlot {
    reserved: Box<dyn Slot>,
    /// The counters of the disk in the slot. `None` if the slot is empty.
    counters: Option<Arc<Counters>>,
}

impl DiskSlots {
    /// Empty slots, numbered from `first` on.
    pub(in crate::vmm) fn new(first: u32, reserved: Vec<Box<dyn Slot>>, queues_per_disk: u16) -> Self {
        let slots = reserved.into_iter().map(|reserved| DiskSlot {
            reserved,
            counters: None,
        });
        Self {
            first,
            slots: slots.collect(),
            queues_per_disk,
        }
    }

    /// Plugs a disk on `backing` into the empty slot `slot`. The guest finds it when it probes the slot again.
    pub(in crate::vmm) fn plug(
        &mut self,
        slot: u32,
        backing: Backing,
        stall_timer: &Arc<StallTimer>,
    ) -> Result<(), MachineError> {
        let queues = self.queues_per_disk;
        let found = self.index_of(slot).and_then(|index| self.slots.get_mut(index));
        let empty = found.filter(|slot| slot.reserved.is_empty());
        let DiskSlot { reserved, counters } = empty.ok_or(MachineError::Slot(slot))?;
        let serial = disk_serial(slot);
        let block = Block::new(serial.clone(), backing, queues, stall_timer);
        let block = Box::new(block.map_err(device_error(format!("set up the disk {serial}")))?);
        let (new_counters, kicks) = (block.counters(), create_kicks(&*block)?);
        reserved.plug(slot, block, kicks)?;
        *counters = Some(new_counters);
        Ok(())
    }

    /// Drops the counters of the disk in disk slot number `slot`, and returns a function that unplugs the
    /// disk ([`Slot::unplugger`]); `None` if there is no such disk slot.
    pub(in crate::vmm) fn release(&mut self, slot: u32) -> Option<Box<dyn FnOnce() + Send>> {
        let index = self.index_of(slot)?;
        let slot = self.slots.get_mut(index)?;
        slot.counters = None;
        Some(slot.reserved.unplugger())
    }

    pub(in crate::vmm) fn counters(&self) -> impl Iterator<Item = &Arc<Counters>> {
        self.slots.iter().filter_map(|slot| slot.counters.as_ref())
    }

    fn index_of(&self, slot: u32) -> Option<usize> {
        usize::try_from(slot.checked_sub(self.first)?).ok()
    }
}
