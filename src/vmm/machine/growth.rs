//! Resizes a machine while it runs. Memory is added by a virtio-mem device, which is plugged when memory is first
//! requested. vCPUs are created on request; the MP table or the MADT lists all of them from the start.
//!
//! Mapped memory only grows. A guest that unplugs memory may plug it again, up to the largest size that was requested
//! so far.

use std::{ops::Range, sync::Arc};

use nutshell_protocol::MEMORY_SLOT;
use vmm_sys_util::eventfd::EventFd;

use crate::vmm::{
    board::{Slot, eventfd},
    end_signal::EndSignal,
    error::{MachineError, device_error},
    kvm::{self, Vm},
    vcpu::{self, Peripherals},
};
use crate::{
    control::MachineConfig,
    devices::{
        counters::Counters,
        virtio::{
            device::{Device, SharedDevice, serve_or_reset},
            fs::Fs,
            mem::{self, Mem},
        },
    },
    memory::{DEVICE_WINDOW, GuestMemory, add_region, ram_ranges},
};

/// The maximum size of a memory block, in bytes: the unit in which Linux adds and removes memory (x86,
/// `probe_memory_block_size`). The region for added memory starts at a multiple of it.
const MAX_LINUX_MEMORY_BLOCK: u64 = 2 << 30;

/// The size of a memory block in guests whose boot memory ends below [`LARGE_GUEST_END`], in bytes.
const MIN_LINUX_MEMORY_BLOCK: u64 = 128 << 20;

/// The end of boot memory, as a guest physical address, from which Linux may use larger memory blocks.
const LARGE_GUEST_END: u64 = 64 << 30;

/// The size of a machine, and how far it can grow.
#[derive(Debug)]
pub(in crate::vmm) struct Growth {
    /// The guest physical addresses for added memory.
    region: Range<u64>,
    /// The size in bytes by which mapped memory grows: a memory block of Linux.
    step: u64,
    /// The size in bytes of the mapped part of the region.
    mapped_size: u64,
    /// The size in bytes of the part that the file server has mapped.
    file_server_size: u64,
    /// The settled size at the previous call of [`Self::newly_settled_size`]. `None` if the size was not settled then,
    /// or if there was no call since [`Self::resize`].
    reported_size: Option<u64>,
    slot: Box<dyn Slot>,
    device: Option<SharedDevice<Mem>>,
    /// The kick eventfd of the device. It is created before the device.
    kick: EventFd,
    vcpus: u8,
    max_vcpus: u8,
    /// The number of vCPUs in the MP table or MADT. CPUID describes a package with this number of cores.
    listed_vcpus: u8,
}

/// The parts of a running machine that growth changes or uses.
pub(in crate::vmm) struct GrowthContext<'a> {
    pub(in crate::vmm) vm: &'a mut Vm,
    pub(in crate::vmm) memory: &'a GuestMemory,
    pub(in crate::vmm) fs: Option<&'a SharedDevice<Fs>>,
    pub(in crate::vmm) peripherals: &'a Arc<Peripherals>,
    pub(in crate::vmm) end: &'a Arc<EndSignal>,
}

impl Growth {
    /// The growth of a machine that boots with `machine`. The memory device will use `slot`.
    pub(in crate::vmm) fn new(machine: &MachineConfig, slot: Box<dyn Slot>) -> Result<Self, MachineError> {
        let boot_end = ram_ranges(machine.memory)
            .last()
            .map_or(0, |(base, length)| base + length);
        let start = boot_end.max(DEVICE_WINDOW.end).next_multiple_of(MAX_LINUX_MEMORY_BLOCK);
        let step = if boot_end < LARGE_GUEST_END {
            MIN_LINUX_MEMORY_BLOCK
        } else {
            MAX_LINUX_MEMORY_BLOCK
        };
        let length = machine.max_memory.saturating_sub(machine.memory).next_multiple_of(step);
        let end = start.checked_add(length);
        let end = end.ok_or(MachineError::BootCommand("max_memory exceeds the address space"))?;
        Ok(Self {
            region: start..end,
            step,
            mapped_size: 0,
            file_server_size: 0,
            reported_size: None,
            slot,
            device: None,
            kick: eventfd("create an eventfd for the memory device")?,
            vcpus: machine.vcpus,
            max_vcpus: machine.max_vcpus.max(machine.vcpus),
            listed_vcpus: machine.max_vcpus,
        })
    }

    /// Plugs the memory device without memory, for a guest that finds devices only at boot. Call it before the guest
    /// boots.
    pub(in crate::vmm) fn plug_at_boot(&mut self) -> Result<(), MachineError> {
        self.plug_device(0)
    }

    /// The kick of the memory device: call [`Self::serve`] when it is readable.
    pub(in crate::vmm) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Requests `bytes` of memory for the guest in addition to its boot memory, and creates vCPUs until there are at
    /// least `vcpus`.
    ///
    /// # Errors
    ///
    /// vCPUs and memory that were added before the failure stay.
    pub(in crate::vmm) fn resize(
        &mut self,
        bytes: u64,
        vcpus: u8,
        mut context: GrowthContext<'_>,
    ) -> Result<(), MachineError> {
        let (max, max_vcpus) = (self.region.end - self.region.start, self.max_vcpus);
        if !bytes.is_multiple_of(mem::BLOCK_SIZE) {
            let text = format!("{bytes} bytes of memory are not a multiple of {}", mem::BLOCK_SIZE);
            return Err(MachineError::Resize(text));
        }
        if bytes > max {
            let text = format!("{bytes} bytes of memory exceed the maximum of {max}");
            return Err(MachineError::Resize(text));
        }
        if vcpus > max_vcpus {
            let text = format!("{vcpus} vCPUs exceed the maximum of {max_vcpus}");
            return Err(MachineError::Resize(text));
        }
        self.reported_size = None;
        while self.vcpus < vcpus {
            self.add_vcpu(&mut context).inspect_err(|_| {
                // KVM may have created the vCPU, and would refuse to create it again.
                self.max_vcpus = self.vcpus;
            })?;
            self.vcpus += 1;
        }
        if bytes > self.mapped_size {
            self.map_up_to(bytes.next_multiple_of(self.step), &mut context)?;
        }
        if self.file_server_size < self.mapped_size {
            if let Some(fs) = context.fs {
                fs.lock()
                    .grow(context.memory.regions())
                    .map_err(MachineError::FileServer)?;
            }
            self.file_server_size = self.mapped_size;
        }
        match &self.device {
            Some(device) => device.lock().request_size(bytes, self.mapped_size),
            None if bytes > 0 => self.plug_device(bytes)?,
            None => {}
        }
        Ok(())
    }

    fn add_vcpu(&self, context: &mut GrowthContext<'_>) -> Result<(), MachineError> {
        let id = self.vcpus;
        for vcpu in context.vm.create_vcpus(id..id + 1, self.listed_vcpus)? {
            kvm::make_reachable(&vcpu)?;
            vcpu::start(id.into(), vcpu, context.peripherals.clone(), context.end.clone())
                .map_err(device_error(format!("start the thread of vCPU {id}")))?;
        }
        Ok(())
    }

    /// Maps the first `size` bytes of the region, for KVM and all devices of this process.
    fn map_up_to(&mut self, size: u64, context: &mut GrowthContext<'_>) -> Result<(), MachineError> {
        let base = self.region.start + self.mapped_size;
        let memory = add_region(context.memory.regions(), base, size - self.mapped_size)?;
        context.vm.add_memory(&memory)?;
        // From now on KVM uses the memory: it must stay mapped even if a later step fails.
        context.memory.grow(memory);
        self.mapped_size = size;
        Ok(())
    }

    fn plug_device(&mut self, bytes: u64) -> Result<(), MachineError> {
        let device = SharedDevice::new(Mem::new(self.region.clone()));
        device.lock().request_size(bytes, self.mapped_size);
        let kick = self
            .kick
            .try_clone()
            .map_err(device_error("duplicate an eventfd of the memory device"))?;
        self.slot.plug(MEMORY_SLOT, Box::new(device.clone()), vec![kick])?;
        self.device = Some(device);
        Ok(())
    }

    /// The size in bytes of the guest's memory in addition to its boot memory. `None` if the guest does not have the
    /// requested size yet, or had it already at the previous call since [`Self::resize`].
    pub(in crate::vmm) fn newly_settled_size(&mut self) -> Option<u64> {
        let device = self.device.as_ref().map(SharedDevice::lock);
        let settled = device.map_or(Some(0), |device| device.is_settled().then(|| device.plugged_size()));
        let new = settled.filter(|_| settled != self.reported_size);
        self.reported_size = settled;
        new
    }

    /// Whether the guest has a driver for the memory device, and how much memory it has added, in bytes.
    pub(in crate::vmm) fn driver_state(&self) -> (bool, u64) {
        let device = self.device.as_ref().map(SharedDevice::lock);
        device.map_or((false, 0), |device| (device.has_driver(), device.plugged_size()))
    }

    /// The counters of the memory device, if it is plugged.
    pub(in crate::vmm) fn counters(&self) -> Option<Arc<Counters>> {
        self.device.as_ref().map(Device::counters)
    }

    /// Handles requests of the guest's driver.
    pub(in crate::vmm) fn serve(&self) {
        if let Some(device) = &self.device {
            // A guest that breaks the queue keeps the memory that it has.
            serve_or_reset(&mut *device.lock(), Mem::serve);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Extent;

    const GIB: u64 = 1 << 30;

    /// A slot that is never used.
    #[derive(Debug)]
    struct NoSlot;

    impl Slot for NoSlot {
        fn plug(&mut self, number: u32, _: Box<dyn Device>, _: Vec<EventFd>) -> Result<(), MachineError> {
            Err(MachineError::Slot(number))
        }

        fn is_empty(&self) -> bool {
            true
        }

        fn unplugger(&self) -> Box<dyn FnOnce() + Send> {
            Box::new(|| {})
        }
    }

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
        };
        Growth::new(&machine, Box::new(NoSlot)).unwrap()
    }

    #[test]
    fn region_for_added_memory_lies_above_boot_memory_and_is_aligned_to_memory_blocks() {
        let cases = [
            (GIB / 2, GIB, 4 * GIB..4 * GIB + GIB / 2),
            (GIB / 2, GIB / 2, 4 * GIB..4 * GIB),
            (GIB / 2, GIB / 2 + (2 << 20), 4 * GIB..4 * GIB + MIN_LINUX_MEMORY_BLOCK),
            (3 * GIB + (2 << 20), 8 * GIB, 6 * GIB..6 * GIB + 5 * GIB),
            (
                62 * GIB,
                63 * GIB + (2 << 20),
                64 * GIB..65 * GIB + MIN_LINUX_MEMORY_BLOCK,
            ),
            // Ends at 64 GiB, because of the window for devices.
            (63 * GIB, 64 * GIB, 64 * GIB..66 * GIB),
            (64 * GIB, 65 * GIB, 66 * GIB..68 * GIB),
        ];
        for (boot, max, region) in cases {
            assert_eq!(growth(boot, max).region, region, "{boot} up to {max}");
        }
    }
}
