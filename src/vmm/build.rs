//! Puts a machine together from what the shim sent: parses the boot command and its descriptors
//! into types, then memory, KVM, devices, kernel and processors, in that order.

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
    end::End,
    error::{BuildError, device},
    growth::Growth,
    kvm::{self, Vm},
    machine::RunningMachine,
    vcpu::{self, Peripherals},
    wiring::{Board, eventfd},
};
use crate::{
    control::{self, MachineConfig},
    devices::{
        uart::Uart,
        virtio::{
            Handle,
            balloon::Balloon,
            block::{Backing, Block},
            console::{Console, Log},
            fs::Fs,
            mmio::InterruptLine,
            rng::Rng,
            vsock::{Vsock, muxer::Muxer},
        },
    },
    memory::{ExpectedAccess, GuestMemory, allocate, load_file},
};

/// What every kernel is told. Quiet before the early console, which else prints all; a panic or
/// halt resets at once by triple fault, which ends the machine; no probing for a timer that KVM's
/// clock makes superfluous. No network device that nobody asked for.
const COMMAND_LINE: &str = "quiet console=hvc0 earlyprintk=serial,ttyS0,115200 panic=-1 reboot=t no_timer_check \
                            tsc=reliable cryptomgr.notests random.trust_cpu=on \
                            dummy.numdummies=0 ifb.numifbs=0 fb_tunnels=none";

/// A boot command and its descriptors as types.
#[derive(Debug)]
pub(crate) struct BootResources {
    machine: MachineConfig,
    kvm: OwnedFd,
    kernel: File,
    initramfs: File,
    agent: OwnedFd,
    share: Option<UnixStream>,
    disks: Vec<Backing>,
}

impl BootResources {
    /// Pairs the command with its descriptors, in the order that [`control::Command::Boot`] says.
    pub(crate) fn parse(machine: MachineConfig, descriptors: Vec<OwnedFd>) -> Result<Self, BuildError> {
        let mut descriptors = descriptors.into_iter();
        let mut next = |what| descriptors.next().ok_or(BuildError::Command(what));
        let parts = Self {
            kvm: next("no /dev/kvm")?,
            kernel: next("no kernel")?.into(),
            initramfs: next("no initramfs")?.into(),
            agent: next("no stream for the agent")?,
            share: if machine.file_server {
                Some(next("no file server")?.into())
            } else {
                None
            },
            disks: machine
                .disks
                .iter()
                .map(|disk| {
                    Ok(Backing {
                        file: next("no file of a disk")?.into(),
                        read_only: *disk == control::DiskAccess::ReadOnly,
                    })
                })
                .collect::<Result<_, BuildError>>()?,
            machine,
        };
        match descriptors.next() {
            None if parts.machine.vcpus > 0 && parts.machine.max_vcpus >= parts.machine.vcpus => Ok(parts),
            None => Err(BuildError::Command("no vCPU")),
            Some(_) => Err(BuildError::Command("a descriptor too many")),
        }
    }
}

/// Builds the machine and lets its processors run; what ends it is reported to `end`, and what it
/// prints goes to `log`.
pub(crate) fn start(parts: BootResources, log: &Arc<Log>, end: &Arc<End>) -> Result<RunningMachine, BuildError> {
    let BootResources {
        machine,
        kvm,
        kernel,
        initramfs,
        agent,
        share,
        disks,
    } = parts;
    let memory = GuestMemory::new(allocate(machine.memory, machine.file_server)?);
    let vm = Vm::new(kvm, memory.regions())?;
    let mut board = Board::new(&vm, memory.clone());

    // First: their names in the guest are numbers (see `slot_device_name`).
    let links = (0..NETWORK_SLOTS)
        .map(|_| board.reserve())
        .collect::<Result<Vec<_>, _>>()?;
    let growth = Growth::new(&machine, board.reserve()?)?;
    let hotplug_disks = (0..machine.hotplug_disks)
        .map(|_| board.reserve())
        .collect::<Result<Vec<_>, _>>()?;
    let mut muxer = Muxer::new().map_err(device("vsock"))?;
    let agent_output = agent.try_clone().map_err(device("vsock"))?;
    muxer
        .open(AGENT_PORT, Some(agent), Some(agent_output))
        .map_err(device("vsock"))?;
    let vsock = Handle::new(Vsock::new(muxer));
    let mut vsock_kicks = board.add(Box::new(vsock.clone()))?.into_iter();
    let console = Handle::new(Console::new(log.clone()));
    let mut console_kicks = board.add(Box::new(console.clone()))?.into_iter();
    let rng = Handle::new(Rng::default());
    let mut rng_kicks = board.add(Box::new(rng.clone()))?.into_iter();
    let balloon = Handle::new(Balloon::default());
    let balloon_kicks = board.add(Box::new(balloon.clone()))?;
    let fs = match share {
        Some(socket) => {
            let line = Arc::new(InterruptLine::always_used(eventfd()?));
            let fs = Handle::new(Fs::new(SHARE_TAG, socket, line.clone()));
            board.add_with_line(Box::new(fs.clone()), line)?;
            Some(fs)
        }
        None => None,
    };
    let mut first_free_slot = 0;
    for backing in disks {
        let disk = Block::new(disk_serial(first_free_slot), backing, machine.vcpus.into()).map_err(device("disk"))?;
        board.add(Box::new(disk))?;
        first_free_slot += 1;
    }

    let loaded = boot::kernel::load(&memory, &kernel, machine.kernel)?;
    let place = boot::initramfs_address(machine.memory, machine.initramfs.length)
        .filter(|address| *address >= loaded.end)
        .ok_or(BuildError::Command("the initramfs does not fit into guest memory"))?;
    load_file(
        &memory,
        "initramfs",
        &initramfs,
        machine.initramfs,
        place,
        ExpectedAccess::ReadMostly,
    )?;
    let archive = boot::Initramfs {
        address: place,
        length: machine.initramfs.length,
    };
    let command_line = format!(
        "{COMMAND_LINE}{} maxcpus={} {}",
        board.arguments, machine.vcpus, machine.kernel_arguments
    );
    boot::write_tables(&memory, machine.memory, command_line.trim_end(), archive)?;
    boot::mptable::write(&memory, machine.max_vcpus).map_err(BootError::from)?;

    let peripherals = Arc::new(Peripherals {
        bus: board.bus,
        uart: Mutex::new(Uart::new(log.clone())),
    });
    for (index, vcpu) in vm
        .create_vcpus(0..machine.vcpus, machine.max_vcpus)?
        .into_iter()
        .enumerate()
    {
        if index == 0 {
            kvm::set_entry(&vcpu, loaded.entry)?;
        }
        vcpu::start(index, vcpu, peripherals.clone(), end.clone()).map_err(device("vCPU thread"))?;
    }
    let kick = |kicks: &mut std::vec::IntoIter<EventFd>| kicks.next().ok_or(BuildError::Command("no queue"));
    Ok(RunningMachine {
        vm,
        memory,
        peripherals,
        end: end.clone(),
        links,
        disk_slots: DiskSlots::new(first_free_slot, hotplug_disks, machine.vcpus.into()),
        growth,
        fs,
        vsock_receive: kick(&mut vsock_kicks)?,
        vsock_transmit: kick(&mut vsock_kicks)?,
        vsock,
        // The first queue is input, which the console does not have.
        console_transmit: kick(&mut console_kicks).and_then(|_input| kick(&mut console_kicks))?,
        console,
        rng_request: kick(&mut rng_kicks)?,
        rng,
        balloon_report: balloon_kicks
            .into_iter()
            .next_back()
            .ok_or(BuildError::Command("no queue"))?,
        balloon,
    })
}
