//! A running machine: its devices, and the operations that change it.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    disk_slots::DiskSlots,
    end_signal::EndSignal,
    error::{MachineError, device_error},
    growth::{Growth, GrowthContext},
    kvm::Vm,
    stalls::StallWatch,
    vcpu::Peripherals,
    wiring::{ReservedSlot, connect_to_kvm, create_kicks, eventfd},
};
use crate::{
    control::MachineStatistics,
    devices::{
        counters::Counters,
        stall_timer::StallTimer,
        virtio::{
            balloon::Balloon,
            block::Backing,
            console::Console,
            device::{Device, SharedDevice},
            fs::Fs,
            interrupt::InterruptLine,
            net::Net,
            rng::Rng,
            vsock::Vsock,
        },
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
    /// The counters of all devices but those in disk slots and the memory device.
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) stall_timer: Arc<StallTimer>,
    pub(super) stall_watch: StallWatch,
    /// When its first processor was started, on the clock of [`crate::control::monotonic_now`].
    pub(super) ready: Duration,
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
        &mut self,
        slot: u32,
        mac: [u8; 6],
        mtu: u16,
        queues: Vec<OwnedFd>,
    ) -> Result<(), MachineError> {
        let reserved = self.network_slots.get(slot as usize);
        let reserved = reserved
            .filter(|reserved| reserved.slot.is_empty())
            .ok_or(MachineError::Slot(slot))?;
        let net = Net::new(format!("net-{slot}"), mac, mtu, queues, &self.stall_timer)
            .map_err(device_error("set up the queues of the tap device"))?;
        let counters = net.counters();
        let (kicks, line) = (create_kicks(&net)?, Arc::new(InterruptLine::new(eventfd()?)));
        let transport = connect_to_kvm(&self.vm, &self.memory, reserved.address, Box::new(net), line, kicks)?;
        if reserved.slot.plug(transport) {
            self.counters.push(counters);
            Ok(())
        } else {
            Err(MachineError::Slot(slot))
        }
    }

    /// Plugs a disk into an empty disk slot. The guest finds it when it probes the slot again.
    pub(super) fn plug_disk(&mut self, slot: u32, backing: Backing) -> Result<(), MachineError> {
        self.disk_slots
            .plug(slot, backing, &self.stall_timer, &self.vm, &self.memory)
    }

    /// What its devices have done, and when it passed the phases of its boot.
    pub(super) fn statistics(&self) -> MachineStatistics {
        MachineStatistics {
            devices: self.all_counters().map(|counters| counters.read()).collect(),
            ready: Some(self.ready),
            kernel: self.peripherals.progress.first_access(),
        }
    }

    fn all_counters(&self) -> impl Iterator<Item = Arc<Counters>> {
        let fixed = self.counters.iter().chain(self.disk_slots.counters()).cloned();
        fixed.chain(self.growth.counters())
    }

    /// Reports stalled queues and streams. Call this when [`Self::stall_timer`] has expired.
    pub(super) fn check_stalls(&mut self) {
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
