//! Builds a machine: parses the boot command and its descriptors, then sets up memory, KVM, devices, kernel and vCPUs,
//! in this order.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use nutshell_protocol::{AGENT_PORT, NETWORK_SLOTS, SHARE_TAG, disk_serial};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::{
    boot::{self, BootError},
    disk_slots::DiskSlots,
    end_signal::EndSignal,
    error::{MachineError, device_error},
    growth::Growth,
    kvm::{self, Vm},
    machine::RunningMachine,
    progress::BootProgress,
    stalls::StallWatch,
    vcpu::{self, Peripherals},
    wiring::{BusBuilder, eventfd},
};
use crate::{
    control::{DiskAccess, MachineConfig, monotonic_now},
    devices::{
        console_tail::ConsoleTail,
        stall_timer::StallTimer,
        uart::Uart,
        virtio::{
            balloon::Balloon,
            block::{Backing, Block},
            console::Console,
            device::SharedDevice,
            fs::Fs,
            interrupt::InterruptLine,
            rng::Rng,
            vsock::{Vsock, muxer::Muxer},
        },
    },
    memory::{ExpectedAccess, GuestMemory, allocate, load_file},
};

/// The kernel arguments of every machine. `quiet` comes first: until the kernel has parsed it, the early console would
/// print everything. A panic or halt resets at once, by triple fault, which ends the machine. Timers are not checked,
/// since KVM's clock makes that unnecessary. No default network devices are created.
const COMMAND_LINE: &str = "quiet console=hvc0 earlyprintk=serial,ttyS0,115200 panic=-1 reboot=t no_timer_check \
                            tsc=reliable cryptomgr.notests random.trust_cpu=on \
                            dummy.numdummies=0 ifb.numifbs=0 fb_tunnels=none";

/// A boot command with its descriptors.
#[derive(Debug)]
pub(super) struct BootResources {
    config: MachineConfig,
    kvm: OwnedFd,
    kernel: File,
    initramfs: File,
    /// The stream of [`AGENT_PORT`].
    agent: OwnedFd,
    file_server: Option<UnixStream>,
    disks: Vec<Backing>,
}

impl BootResources {
    /// Assigns the descriptors, which come in the order that [`crate::control::Command::Boot`] documents.
    pub(super) fn parse(config: MachineConfig, descriptors: Vec<OwnedFd>) -> Result<Self, MachineError> {
        if config.vcpus == 0 || config.max_vcpus < config.vcpus {
            return Err(MachineError::BootCommand("no vCPU, or more than max_vcpus"));
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = |missing| descriptors.next().ok_or(MachineError::BootCommand(missing));
        let resources = Self {
            kvm: next("no /dev/kvm")?,
            kernel: next("no kernel")?.into(),
            initramfs: next("no initramfs")?.into(),
            agent: next("no stream for the agent")?,
            file_server: if config.file_server {
                Some(next("no socket of the file server")?.into())
            } else {
                None
            },
            disks: config
                .disks
                .iter()
                .map(|disk| {
                    Ok(Backing {
                        file: next("no file for a disk")?.into(),
                        read_only: *disk == DiskAccess::ReadOnly,
                    })
                })
                .collect::<Result<_, MachineError>>()?,
            config,
        };
        match descriptors.next() {
            None => Ok(resources),
            Some(_) => Err(MachineError::BootCommand("too many descriptors")),
        }
    }
}

/// Builds the machine and starts its vCPUs. The reason for its end is reported to `end`, and its console output is
/// appended to `console_tail`.
pub(super) fn start(
    resources: BootResources,
    console_tail: &Arc<ConsoleTail>,
    end: &Arc<EndSignal>,
) -> Result<RunningMachine, MachineError> {
    let BootResources {
        config,
        kvm,
        kernel,
        initramfs,
        agent,
        file_server,
        disks,
    } = resources;
    let memory = GuestMemory::new(allocate(config.memory, config.file_server)?);
    let vm = Vm::new(kvm, memory.regions())?;
    let mut bus = BusBuilder::new(&vm, memory.clone());
    let stall_timer = Arc::new(StallTimer::new().map_err(device_error("create the timer for stalled queues"))?);

    // The slots come first on the bus, because the guest finds them by their position (see `slot_device_name`).
    let network_slots = (0..NETWORK_SLOTS)
        .map(|_| bus.reserve())
        .collect::<Result<Vec<_>, _>>()?;
    let growth = Growth::new(&config, bus.reserve()?)?;
    let hotplug_disks = (0..config.hotplug_disks)
        .map(|_| bus.reserve())
        .collect::<Result<Vec<_>, _>>()?;
    let mut muxer = Muxer::new(&stall_timer).map_err(device_error("set up the vsock device"))?;
    let agent_output = agent
        .try_clone()
        .map_err(device_error("duplicate the agent's stream"))?;
    muxer
        .open(AGENT_PORT, Some(agent), Some(agent_output))
        .map_err(device_error("open the agent's stream"))?;
    let vsock = SharedDevice::new(Vsock::new(muxer));
    let [vsock_receive_kick, vsock_transmit_kick, _event_kick] = kicks(bus.add(Box::new(vsock.clone()))?)?;
    let console = SharedDevice::new(Console::new(console_tail.clone()));
    let [_receive_kick, console_transmit_kick] = kicks(bus.add(Box::new(console.clone()))?)?;
    let rng = SharedDevice::new(Rng::default());
    let [rng_kick] = kicks(bus.add(Box::new(rng.clone()))?)?;
    let balloon = SharedDevice::new(Balloon::default());
    let [_inflate_kick, _deflate_kick, balloon_reporting_kick] = kicks(bus.add(Box::new(balloon.clone()))?)?;
    let fs = match file_server {
        Some(socket) => {
            let line = Arc::new(InterruptLine::always_used(eventfd()?));
            let fs = SharedDevice::new(Fs::new(SHARE_TAG, socket, line.clone()));
            bus.add_with_line(Box::new(fs.clone()), line)?;
            Some(fs)
        }
        None => None,
    };
    let queues_per_disk = u16::from(config.vcpus);
    let mut boot_disks = 0;
    for backing in disks {
        let disk = Block::new(disk_serial(boot_disks), backing, queues_per_disk, &stall_timer)
            .map_err(device_error("set up the disk"))?;
        bus.add(Box::new(disk))?;
        boot_disks += 1;
    }

    let kernel = boot::kernel::load(&memory, &kernel, config.kernel)?;
    let initramfs_address = boot::tables::initramfs_address(config.memory, config.initramfs.length)
        .filter(|address| *address >= kernel.end)
        .ok_or(BootError::Initramfs)?;
    load_file(
        &memory,
        "initramfs",
        &initramfs,
        config.initramfs,
        initramfs_address,
        ExpectedAccess::ReadMostly,
    )?;
    let initramfs = boot::tables::LoadedInitramfs {
        address: initramfs_address,
        length: config.initramfs.length,
    };
    let command_line = format!(
        "{COMMAND_LINE}{} maxcpus={} {}",
        bus.kernel_arguments, config.vcpus, config.kernel_arguments
    );
    boot::tables::write(&memory, config.memory, command_line.trim_end(), initramfs)?;
    boot::mptable::write(&memory, config.max_vcpus).map_err(BootError::from)?;

    let BusBuilder { bus, counters, .. } = bus;
    let peripherals = Arc::new(Peripherals {
        bus,
        uart: Mutex::new(Uart::new(console_tail.clone())),
        progress: BootProgress::new(),
    });
    for (index, vcpu) in vm
        .create_vcpus(0..config.vcpus, config.max_vcpus)?
        .into_iter()
        .enumerate()
    {
        if index == 0 {
            kvm::set_entry(&vcpu, kernel.entry)?;
        }
        vcpu::start(index, vcpu, peripherals.clone(), end.clone())
            .map_err(device_error("start the thread of a vCPU"))?;
    }
    Ok(RunningMachine {
        vm,
        memory,
        peripherals,
        end: end.clone(),
        network_slots,
        disk_slots: DiskSlots::new(boot_disks, hotplug_disks, queues_per_disk),
        counters,
        stall_timer,
        stall_watch: StallWatch::default(),
        ready: monotonic_now(),
        growth,
        fs,
        vsock,
        vsock_receive_kick,
        vsock_transmit_kick,
        console,
        console_transmit_kick,
        rng,
        rng_kick,
        balloon,
        balloon_reporting_kick,
    })
}

/// The kicks of a device with `N` queues.
fn kicks<const N: usize>(kicks: Vec<EventFd>) -> Result<[EventFd; N], MachineError> {
    let wrong_number = |_| device_error("create the queues of a device")(std::io::ErrorKind::InvalidData.into());
    kicks.try_into().map_err(wrong_number)
}
