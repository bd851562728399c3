//! Places on the bus for disks that come and go while the machine runs: those of a pod's containers.

use std::{io, sync::Arc};

use nutshell_protocol::disk_serial;
use vmm_sys_util::eventfd::EventFd;

use super::{
    error::{BuildError, device},
    kvm::Vm,
    wiring::{ReservedSlot, connect, eventfd, kicks_of},
};
use crate::{
    devices::virtio::{
        block::{Backing, Block},
        mmio::{HotplugSlot, InterruptLine, Mmio},
    },
    memory::GuestMemory,
};

/// The places, by disk slot.
#[derive(Debug)]
pub(super) struct DiskSlots {
    /// The number of the first: those below are the disks of the boot.
    first: u32,
    slots: Vec<DiskSlot>,
    /// How many queues a disk has.
    queues: u16,
}

#[derive(Debug)]
struct DiskSlot {
    place: ReservedSlot,
    /// What the first disk was wired with. KVM keeps it, and the next disk has it too.
    wires: Option<Wires>,
}

#[derive(Debug)]
struct Wires {
    irqfd: EventFd,
    kicks: Vec<EventFd>,
}

impl DiskSlots {
    /// Empty ones, numbered from `first` on.
    pub(super) fn new(first: u32, places: Vec<ReservedSlot>, queues: u16) -> Self {
        let slots = places.into_iter().map(|place| DiskSlot { place, wires: None });
        Self {
            first,
            slots: slots.collect(),
            queues,
        }
    }

    /// Puts a disk on `backing` into the empty slot `slot`; the guest's driver finds it when it looks again.
    pub(super) fn plug(
        &mut self,
        slot: u32,
        backing: Backing,
        vm: &Vm,
        memory: &GuestMemory,
    ) -> Result<(), BuildError> {
        let queues = self.queues;
        let free = self.slot(slot).filter(|slot| slot.place.slot.is_empty());
        let DiskSlot { place, wires } = free.ok_or(BuildError::Slot(slot))?;
        let block = Box::new(Block::new(disk_serial(slot), backing, queues).map_err(device("disk"))?);
        let transport = if let Some(wires) = wires {
            let Wires { irqfd, kicks } = wires.again().map_err(device("eventfd"))?;
            Mmio::new(block, memory.clone(), Arc::new(InterruptLine::new(irqfd)), kicks)
        } else {
            let first = Wires {
                irqfd: eventfd()?,
                kicks: kicks_of(&*block)?,
            };
            let Wires { irqfd, kicks } = first.again().map_err(device("eventfd"))?;
            let line = Arc::new(InterruptLine::new(irqfd));
            let transport = connect(vm, memory, place.address, block, line, kicks)?;
            *wires = Some(first);
            transport
        };
        if place.slot.fill(transport) {
            Ok(())
        } else {
            Err(BuildError::Slot(slot))
        }
    }

    /// The place of `slot`, for its disk to be taken out; none where there is no such slot.
    pub(super) fn place(&mut self, slot: u32) -> Option<HotplugSlot> {
        self.slot(slot).map(|slot| slot.place.slot.clone())
    }

    fn slot(&mut self, slot: u32) -> Option<&mut DiskSlot> {
        let index = usize::try_from(slot.checked_sub(self.first)?).ok()?;
        self.slots.get_mut(index)
    }
}

impl Wires {
    fn again(&self) -> io::Result<Self> {
        Ok(Self {
            irqfd: self.irqfd.try_clone()?,
            kicks: self.kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?,
        })
    }
}
