//! A running machine: its devices, and the operations that change it.
//!
//! Belongs here: [`RunningMachine`]; [`growth`], which resizes it; and [`disk_slots`], its hot-plugged disks.
//! Does not belong here: the connection of a device to the guest, in [`super::board`]. [`super::build`] makes the
//! machine, and [`super::event_loop`] drives it.

pub(super) mod disk_slots;
pub(super) mod growth;

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use self::{
    disk_slots::DiskSlots,
    growth::{Growth, GrowthContext},
};
use crate::vmm::{
    board::{Slot, create_kicks},
    end_signal::EndSignal,
    error::{MachineError, device_error},
    kvm::Vm,
    serial_console::SerialConsole,
    stalls::StallWatch,
    vcpu::Peripherals,
};
use crate::{
    control::{Lease, MachineStatistics},
    devices::{
        counters::Counters,
        pc::ged::GenericEvents,
        stall_timer::StallTimer,
        virtio::{
            balloon::Balloon,
            block::{Backing, GrowthWatch},
            console::Console,
            device::{Device, SharedDevice},
            fs::Fs,
            named_port::NamedPort,
            net::Net,
            rng::Rng,
            vsock::Vsock,
        },
    },
    memory::GuestMemory,
};

/// A running machine. The event loop drives it.
#[derive(Debug)]
pub(in crate::vmm) struct RunningMachine {
    /// Must stay open while vCPUs run: closing the descriptor makes KVM release the irqfds.
    pub(in crate::vmm) vm: Vm,
    pub(in crate::vmm) memory: GuestMemory,
    pub(in crate::vmm) peripherals: Arc<Peripherals>,
    pub(in crate::vmm) end: Arc<EndSignal>,
    pub(in crate::vmm) network_slots: Vec<Box<dyn Slot>>,
    /// Checks the sizes of the disks of a user's kernel. `None` if none of them can grow.
    #[expect(dead_code, reason = "its thread ends when it is dropped")]
    pub(in crate::vmm) growth_watch: Option<GrowthWatch>,
    pub(in crate::vmm) disk_slots: DiskSlots,
    /// The counters of all devices but those in disk slots and the memory device.
    pub(in crate::vmm) counters: Vec<Arc<Counters>>,
    pub(in crate::vmm) stall_timer: Arc<StallTimer>,
    pub(in crate::vmm) stall_watch: StallWatch,
    /// When the machine was built, just before its vCPUs start, on the clock of [`crate::control::monotonic_now`].
    pub(in crate::vmm) ready: Duration,
    /// Adds memory and vCPUs while the machine runs.
    pub(in crate::vmm) growth: Growth,
    pub(in crate::vmm) fs: Option<SharedDevice<Fs>>,
    pub(in crate::vmm) vsock: SharedDevice<Vsock>,
    pub(in crate::vmm) vsock_receive_kick: EventFd,
    pub(in crate::vmm) vsock_transmit_kick: EventFd,
    /// The virtio console of a guest with an agent, and the kick of its transmit queue.
    pub(in crate::vmm) console: Option<(SharedDevice<Console>, EventFd)>,
    /// The serial console of a user's kernel.
    pub(in crate::vmm) serial_console: Option<SerialConsole>,
    /// The port of the guest agent, if a user's kernel has one.
    pub(in crate::vmm) guest_agent: Option<SharedDevice<NamedPort>>,
    /// The power button of a user's kernel.
    pub(in crate::vmm) power_button: Option<GenericEvents>,
    pub(in crate::vmm) rng: SharedDevice<Rng>,
    pub(in crate::vmm) rng_kick: EventFd,
    pub(in crate::vmm) balloon: SharedDevice<Balloon>,
    /// With [`Self::second_balloon_kick`], the kicks of the balloon's queues for statistics and free page reporting. A
    /// driver that accepts only one of these features uses this one for its queue.
    pub(in crate::vmm) balloon_kick: EventFd,
    /// `None` if the balloon does not offer statistics.
    pub(in crate::vmm) second_balloon_kick: Option<EventFd>,
}

impl RunningMachine {
    /// Plugs a network device into an empty slot. The guest finds it when it probes the slot again, and gets `lease` by
    /// DHCP.
    pub(in crate::vmm) fn plug_network_device(
        &mut self,
        slot: u32,
        mac: [u8; 6],
        mtu: u16,
        queues: Vec<OwnedFd>,
        lease: Option<&Lease>,
    ) -> Result<(), MachineError> {
        let reserved = self.network_slots.get_mut(slot as usize);
        let reserved = reserved
            .filter(|reserved| reserved.is_empty())
            .ok_or(MachineError::Slot(slot))?;
        let name = format!("net-{slot}");
        let step = format!("set up the queues of the tap device of {name}");
        let mut net = Net::new(name, mac, mtu, queues, &self.stall_timer).map_err(device_error(step))?;
        if let Some(lease) = lease {
            net.serve_lease(lease);
        }
        let (counters, kicks) = (net.counters(), create_kicks(&net)?);
        reserved.plug(slot, Box::new(net), kicks)?;
        self.counters.push(counters);
        Ok(())
    }

    /// Plugs a disk into an empty disk slot. The guest finds it when it probes the slot again.
    pub(in crate::vmm) fn plug_disk(&mut self, slot: u32, backing: Backing) -> Result<(), MachineError> {
        self.disk_slots.plug(slot, backing, &self.stall_timer)
    }

    /// Reads the counters of its devices, and the times of its boot phases.
    pub(in crate::vmm) fn statistics(&self) -> MachineStatistics {
        MachineStatistics {
            devices: self.all_counters().map(|counters| counters.read()).collect(),
            built_at: Some(self.ready),
            first_io_at: self.peripherals.progress.first_io_at(),
        }
    }

    fn all_counters(&self) -> impl Iterator<Item = Arc<Counters>> {
        let fixed = self.counters.iter().chain(self.disk_slots.counters()).cloned();
        fixed.chain(self.growth.counters())
    }

    /// Reports stalled queues and streams. Call this when [`Self::stall_timer`] has expired.
    pub(in crate::vmm) fn check_stalls(&mut self) {
        self.stall_timer.expire();
        let vsock = self.vsock.lock().muxer().pending();
        let vsock_counters = self.vsock.counters();
        let mut devices: Vec<_> = self
            .all_counters()
            .filter(|counters| !Arc::ptr_eq(counters, &vsock_counters))
            .map(|counters| {
                let pending = counters.pending();
                (counters, pending)
            })
            .collect();
        devices.push((vsock_counters, vsock));
        if self.stall_watch.check(devices, Instant::now()) {
            self.stall_timer.start();
        }
    }

    /// Executes [`crate::control::Command::Resize`].
    pub(in crate::vmm) fn resize(&mut self, bytes: u64, vcpus: u8) -> Result<(), MachineError> {
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
