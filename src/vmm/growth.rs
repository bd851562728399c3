//! A machine that changes its size while it runs: memory by a virtio-mem device that is plugged when the
//! first of it is asked for, processors by creating what the tables of [`super::boot::mptable`] have named
//! from the start.
//!
//! The host's side only grows: a guest that gives memory back may take it again, up to the most that it
//! was ever given.

use std::{ops::Range, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{
    end::End,
    error::{BuildError, device},
    kvm::{self, Vm},
    vcpu::{self, Peripherals},
    wiring::{ReservedSlot, connect, eventfd},
};
use crate::{
    control::MachineConfig,
    devices::virtio::{
        Device, Handle,
        fs::Fs,
        mem::{self, Mem},
        mmio::InterruptLine,
    },
    memory::{DEVICE_WINDOW, GuestMemory, add_region, ram_ranges},
};

/// What Linux adds and removes memory by, at most (x86, `probe_memory_block_size`): the region starts at a
/// multiple of it.
const LARGEST_MEMORY_BLOCK: u64 = 2 << 30;

/// The same, for guests of less than 64 GiB.
const MEMORY_BLOCK: u64 = 128 << 20;

/// The most memory at boot for which Linux takes [`MEMORY_BLOCK`].
const SMALL_BLOCK_MAX_MEMORY: u64 = 64 << 30;

/// What a machine may become.
#[derive(Debug)]
pub(crate) struct Growth {
    region: Range<u64>,
    step: u64,
    /// How much of the region there is on the host, in bytes.
    usable: u64,
    /// How much of that the file server knows.
    shared: u64,
    /// What [`Self::newly_settled`] has said, since the last [`Self::resize`].
    said: Option<u64>,
    place: ReservedSlot,
    device: Option<Handle<Mem>>,
    request: EventFd,
    vcpus: u8,
    max_vcpus: u8,
    /// How many the tables of the boot have.
    named_vcpus: u8,
}

/// The parts of a running machine that growth touches.
pub(crate) struct GrowthContext<'a> {
    pub(crate) vm: &'a mut Vm,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) fs: Option<&'a Handle<Fs>>,
    pub(crate) peripherals: &'a Arc<Peripherals>,
    pub(crate) end: &'a Arc<End>,
}

impl Growth {
    /// For a machine that boots as `machine` says; its memory device will be at `place`.
    pub(crate) fn new(machine: &MachineConfig, place: ReservedSlot) -> Result<Self, BuildError> {
        let boot_end = ram_ranges(machine.memory)
            .last()
            .map_or(0, |(base, length)| base + length);
        let start = boot_end.max(DEVICE_WINDOW.end).next_multiple_of(LARGEST_MEMORY_BLOCK);
        let step = if machine.memory < SMALL_BLOCK_MAX_MEMORY {
            MEMORY_BLOCK
        } else {
            LARGEST_MEMORY_BLOCK
        };
        let length = machine.max_memory.saturating_sub(machine.memory).next_multiple_of(step);
        let end = start.checked_add(length);
        let end = end.ok_or(BuildError::Command("more memory than there are addresses"))?;
        Ok(Self {
            region: start..end,
            step,
            usable: 0,
            shared: 0,
            said: None,
            place,
            device: None,
            request: eventfd()?,
            vcpus: machine.vcpus,
            max_vcpus: machine.max_vcpus.max(machine.vcpus),
            named_vcpus: machine.max_vcpus,
        })
    }

    /// Readable when the guest's driver has something for [`Self::serve`].
    pub(crate) fn request(&self) -> &EventFd {
        &self.request
    }

    /// Lets the guest have `bytes` of memory beyond what it booted with and at least `vcpus` processors.
    pub(crate) fn resize(&mut self, bytes: u64, vcpus: u8, mut context: GrowthContext<'_>) -> Result<(), BuildError> {
        if !bytes.is_multiple_of(mem::BLOCK) || bytes > self.region.end - self.region.start {
            return Err(BuildError::Command("memory that the machine cannot have"));
        }
        if vcpus > self.max_vcpus {
            return Err(BuildError::Command("processors that the machine cannot have"));
        }
        self.said = None;
        while self.vcpus < vcpus {
            self.add_processor(&mut context).inspect_err(|_| {
                // KVM may have it by now and creates no second one of its number.
                self.max_vcpus = self.vcpus;
            })?;
            self.vcpus += 1;
        }
        if bytes > self.usable {
            self.extend(bytes.next_multiple_of(self.step), &mut context)?;
        }
        if self.shared < self.usable {
            if let Some(fs) = context.fs {
                fs.lock()
                    .grow(context.memory.regions())
                    .map_err(BuildError::FileServer)?;
            }
            self.shared = self.usable;
        }
        match &self.device {
            Some(device) => device.lock().request(bytes, self.usable),
            None if bytes > 0 => self.plug(bytes, &context)?,
            None => {}
        }
        Ok(())
    }

    fn add_processor(&self, context: &mut GrowthContext<'_>) -> Result<(), BuildError> {
        let id = self.vcpus;
        for vcpu in context.vm.create_vcpus(id..id + 1, self.named_vcpus)? {
            kvm::announce(&vcpu)?;
            vcpu::start(id.into(), vcpu, context.peripherals.clone(), context.end.clone())
                .map_err(device("vCPU thread"))?;
        }
        Ok(())
    }

    /// Puts memory there, for KVM and for every device, before the guest may use it.
    fn extend(&mut self, usable: u64, context: &mut GrowthContext<'_>) -> Result<(), BuildError> {
        let base = self.region.start + self.usable;
        let memory = add_region(context.memory.regions(), base, usable - self.usable)?;
        context.vm.add_memory(&memory)?;
        // What KVM has must stay mapped, whatever follows.
        context.memory.grow(memory);
        self.usable = usable;
        Ok(())
    }

    fn plug(&mut self, bytes: u64, context: &GrowthContext<'_>) -> Result<(), BuildError> {
        let device = Handle::new(Mem::new(self.region.clone()));
        device.lock().request(bytes, self.usable);
        let kick = self.request.try_clone().map_err(super::error::device("eventfd"))?;
        let line = Arc::new(InterruptLine::new(eventfd()?));
        let address = self.place.address;
        let transport = connect(
            context.vm,
            context.memory,
            address,
            Box::new(device.clone()),
            line,
            vec![kick],
        )?;
        if !self.place.slot.fill(transport) {
            return Err(BuildError::Command("the slot for memory is taken"));
        }
        self.device = Some(device);
        Ok(())
    }

    /// What the guest has beyond what it booted with, in bytes, if that is what it should have and was not
    /// said since the last [`Self::resize`].
    pub(crate) fn newly_settled(&mut self) -> Option<u64> {
        let device = self.device.as_ref().map(Handle::lock);
        let settled = device.map_or(Some(0), |device| device.is_settled().then(|| device.size()));
        let new = settled.filter(|_| settled != self.said);
        self.said = settled;
        new
    }

    /// Answers the guest's driver.
    pub(crate) fn serve(&self) {
        if let Some(device) = &self.device {
            let mut device = device.lock();
            // A guest that breaks the queue goes on with the memory that it has.
            if device.serve().is_err() {
                device.reset();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{control::Extent, devices::virtio::mmio::HotplugSlot, vmm::wiring::Address};

    const GIB: u64 = 1 << 30;

    fn growth(memory: u64, max_memory: u64) -> Growth {
        let extent = Extent { offset: 0, length: 0 };
        let machine = MachineConfig {
            memory,
            max_memory,
            vcpus: 1,
            max_vcpus: 4,
            file_server: true,
            disks: Vec::new(),
            hotplug_disks: 0,
            kernel: extent,
            initramfs: extent,
            kernel_arguments: String::new(),
        };
        let place = ReservedSlot {
            address: Address { base: 0, line: 5 },
            slot: HotplugSlot::default(),
        };
        Growth::new(&machine, place).unwrap()
    }

    #[test]
    fn region_lies_behind_all_memory_of_the_boot_where_linux_can_add_it() {
        let cases = [
            (GIB / 2, GIB, 4 * GIB..4 * GIB + GIB / 2),
            (GIB / 2, GIB / 2, 4 * GIB..4 * GIB),
            (GIB / 2, GIB / 2 + (2 << 20), 4 * GIB..4 * GIB + MEMORY_BLOCK),
            (3 * GIB + (2 << 20), 8 * GIB, 6 * GIB..6 * GIB + 5 * GIB),
            (64 * GIB, 65 * GIB, 66 * GIB..68 * GIB),
        ];
        for (boot, most, region) in cases {
            assert_eq!(growth(boot, most).region, region, "{boot} up to {most}");
        }
    }
}
