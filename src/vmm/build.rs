//! Builds a machine: sets up memory, KVM, devices, kernel and vCPUs, in this order.

use std::{fs::File, ops::Range, os::fd::OwnedFd, sync::Arc};

use nutshell_protocol::{AGENT_PORT, NETWORK_SLOTS, SHARE_TAG};
use vmm_sys_util::eventfd::EventFd;

use super::{
    board::{
        Board, Buses,
        container::ContainerBoard,
        pc::{PcBoard, PcDevices},
    },
    boot::{self, BootError},
    end_signal::EndSignal,
    error::{MachineError, device_error},
    kvm::{self, Vm},
    machine::{RunningMachine, disk_slots::DiskSlots, growth::Growth},
    progress::BootProgress,
    resources::{BootResources, Identity, SoftwareResources},
    serial_console::SerialConsole,
    stalls::StallWatch,
    vcpu::{self, Peripherals},
};
use crate::{
    control::{BoardKind, Extent, GUEST_AGENT_PORT, LinkConfig, MachineConfig, monotonic_now},
    devices::{
        console_tail::ConsoleTail,
        output_sink::OutputSink,
        pc::ged::GenericEvents,
        stall_timer::StallTimer,
        virtio::{
            balloon::{self, Balloon},
            block::{Block, GrowthWatch},
            console::Console,
            device::{Device, SharedDevice},
            fs::Fs,
            named_port::NamedPort,
            rng::Rng,
            vsock::{Vsock, muxer::Muxer},
        },
    },
    memory::{ExpectedAccess, GuestMemory, advise_huge_pages, allocate, create_sealed_file, load_file, ram_ranges},
};

/// The kernel arguments of every machine with an agent. `quiet` comes first: until the kernel has parsed it, the early
/// console would print everything. A panic or restart resets at once, by triple fault, which ends the machine. Timers are
/// not checked, since KVM's clock makes that unnecessary. No default network devices are created. A ramfs can use the
/// pages of the initramfs as those of its files (`guest/kernel/patches/optional/initramfs-pages.patch`).
const COMMAND_LINE: &str = "quiet console=hvc0 earlyprintk=serial,ttyS0,115200 panic=-1 reboot=t no_timer_check \
                            tsc=reliable cryptomgr.notests random.trust_cpu=on \
                            dummy.numdummies=0 ifb.numifbs=0 fb_tunnels=none rootfstype=ramfs";

/// What Linux allocates at the end of memory while it boots, besides 64 bytes for each page. In bytes, measured
/// in a machine of 512 MiB.
const FIRST_TABLES: u64 = 6 << 20;

/// Builds the machine and starts its vCPUs. The reason for its end is reported to `end`, and its console output is
/// appended to `console_tail`.
pub(super) fn start(
    resources: BootResources,
    huge_page_file: Option<File>,
    console_tail: &Arc<ConsoleTail>,
    end: &Arc<EndSignal>,
) -> Result<RunningMachine, MachineError> {
    let BootResources {
        config,
        kvm,
        kernel,
        software,
        file_server,
        disks,
    } = resources;
    let is_users_kernel = matches!(software, SoftwareResources::User { .. });
    // The disks of containers belong to snapshotters, which do not extend them.
    let disks_may_grow = is_users_kernel;
    let shared_memory = if config.file_server {
        let file = huge_page_file.map_or_else(create_sealed_file, Ok);
        Some(file.map_err(device_error("create the file for shared guest memory"))?)
    } else {
        None
    };
    let memory = GuestMemory::new(allocate(config.memory, shared_memory)?);
    advise_huge_pages(memory.regions(), boot_allocations(config.memory));
    let vm = Vm::new(kvm, memory.regions())?;
    let Platform {
        mut board,
        console_tail: virtio_console_tail,
        agent,
        initramfs,
        command_line,
        links,
        serial_console,
        guest_agent,
        power_button,
    } = Platform::new(software, &vm, &memory, console_tail, end)?;
    let stall_timer = Arc::new(StallTimer::new().map_err(device_error("create the timer for stalled queues"))?);

    // The slots come first on the bus, because the guest finds them by their position (see `slot_device_name`).
    let network_slots = (0..NETWORK_SLOTS)
        .map(|_| board.reserve_slot())
        .collect::<Result<Vec<_>, _>>()?;
    let mut growth = Growth::new(&config, board.reserve_slot()?)?;
    let grows_at_boot = is_users_kernel && config.max_memory > config.memory;
    if grows_at_boot {
        growth.plug_at_boot()?;
    }
    let hotplug_disks = (0..config.hotplug_disks)
        .map(|_| board.reserve_slot())
        .collect::<Result<Vec<_>, _>>()?;
    let mut counters = Vec::new();
    let mut add = |device: Box<dyn Device>| {
        counters.push(device.counters());
        board.add(device)
    };
    let mut muxer = Muxer::new(&stall_timer).map_err(device_error("set up the vsock device"))?;
    if let Some(agent) = agent {
        let agent_output = agent
            .try_clone()
            .map_err(device_error("duplicate the agent's stream"))?;
        muxer
            .open(AGENT_PORT, Some(agent), Some(agent_output))
            .map_err(device_error("open the agent's stream"))?;
    }
    let vsock = SharedDevice::new(Vsock::new(muxer));
    let [vsock_receive_kick, vsock_transmit_kick, _event_kick] = kicks(add(Box::new(vsock.clone()))?)?;
    let console = match virtio_console_tail {
        Some(tail) => {
            let console = SharedDevice::new(Console::new(tail));
            let [_receive_kick, transmit_kick] = kicks(add(Box::new(console.clone()))?)?;
            Some((console, transmit_kick))
        }
        None => None,
    };
    let rng = SharedDevice::new(Rng::default());
    let [rng_kick] = kicks(add(Box::new(rng.clone()))?)?;
    // The statistics of the balloon show whether a guest without an agent uses added memory. In other guests, the agent
    // brings the memory online.
    let balloon = SharedDevice::new(Balloon::new(grows_at_boot));
    let mut balloon_kicks = add(Box::new(balloon.clone()))?.into_iter().skip(balloon::UNUSED_QUEUES);
    let [balloon_kick] = kicks(balloon_kicks.by_ref().take(1).collect())?;
    let second_balloon_kick = balloon_kicks.next();
    // The counters of the file system device are not reported: the file server serves the guest directly, so this
    // process sees no requests.
    let fs = match file_server {
        Some(socket) => {
            let fs = SharedDevice::new(Fs::new(SHARE_TAG, socket));
            board.add(Box::new(fs.clone()))?;
            Some(fs)
        }
        None => None,
    };
    let queues_per_disk = u16::from(config.vcpus);
    let mut boot_disks = 0;
    let mut growing_disks = Vec::new();
    for (serial, backing) in disks {
        let failed = device_error(format!("set up the disk {serial}"));
        let mut disk = Block::new(serial, backing, queues_per_disk, &stall_timer).map_err(failed)?;
        counters.push(disk.counters());
        if disks_may_grow {
            growing_disks.extend(disk.growing_disk());
        }
        board.add(Box::new(disk))?;
        boot_disks += 1;
    }
    let growth_watch =
        GrowthWatch::start(growing_disks).map_err(device_error("start the thread that checks the sizes of disks"))?;

    let guest_agent = match guest_agent {
        Some(socket) => {
            let failed = || device_error("set up the port of the guest agent");
            let port = NamedPort::new(GUEST_AGENT_PORT, "guest-agent", socket, &stall_timer).map_err(failed())?;
            counters.push(port.counters());
            let port = SharedDevice::new(port);
            let kicks = board.add(Box::new(port.clone()))?;
            port.lock().watch_kicks(kicks).map_err(failed())?;
            Some(port)
        }
        None => None,
    };

    counters.extend(serial_console.as_ref().map(SerialConsole::counters));
    let entry = load_software(&config, &memory, &*board, &kernel, initramfs, &command_line)?;

    let Buses { memory: bus, ports } = board.finish();
    let peripherals = Arc::new(Peripherals {
        bus,
        ports,
        progress: BootProgress::new(),
    });
    let vcpus = vm.create_vcpus(0..config.vcpus, config.max_vcpus)?;
    let mut machine = RunningMachine {
        vm,
        memory,
        peripherals: peripherals.clone(),
        end: end.clone(),
        network_slots,
        growth_watch,
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
        serial_console,
        guest_agent,
        power_button,
        rng,
        rng_kick,
        balloon,
        balloon_kick,
        second_balloon_kick,
    };
    for (slot, (link, queues)) in (0..).zip(links) {
        machine.plug_network_device(slot, link.mac, link.mtu, queues, link.lease.as_ref())?;
    }
    for (index, vcpu) in vcpus.into_iter().enumerate() {
        if index == 0 {
            kvm::set_entry(&vcpu, entry)?;
        }
        vcpu::start(index, vcpu, peripherals.clone(), end.clone())
            .map_err(device_error(format!("start the thread of vCPU {index}")))?;
    }
    Ok(machine)
}

/// Returns the guest physical addresses that Linux fills while it boots, if the machine has `memory` bytes: the end of
/// memory, where it allocates 64 bytes for each page, and its first tables.
fn boot_allocations(memory: u64) -> Range<u64> {
    let (base, length) = ram_ranges(memory).last().copied().unwrap_or_default();
    let end = base + length;
    end.saturating_sub(memory / 64 + FIRST_TABLES).max(base)..end
}

/// The parts of a machine that depend on its software.
struct Platform {
    board: Box<dyn Board>,
    /// The tail that receives the output of the virtio console; `None` without that console.
    console_tail: Option<Arc<ConsoleTail>>,
    /// The agent's stream.
    agent: Option<OwnedFd>,
    initramfs: Option<(File, Extent)>,
    /// Without the arguments of the board.
    command_line: CommandLine,
    links: Vec<(LinkConfig, Vec<OwnedFd>)>,
    serial_console: Option<SerialConsole>,
    /// The socket behind the port of the guest agent, if there is one.
    guest_agent: Option<OwnedFd>,
    power_button: Option<GenericEvents>,
}

/// The kernel's command line.
enum CommandLine {
    /// [`COMMAND_LINE`], the board's arguments, `maxcpus`, and these.
    Agent(String),
    /// The whole command line.
    User(String),
}

impl Platform {
    fn new(
        software: SoftwareResources,
        vm: &Vm,
        memory: &GuestMemory,
        console_tail: &Arc<ConsoleTail>,
        end: &Arc<EndSignal>,
    ) -> Result<Self, MachineError> {
        match software {
            SoftwareResources::Agent {
                board,
                initramfs,
                stream,
                kernel_arguments,
            } => Ok(Self {
                board: match board {
                    BoardKind::Container => Box::new(ContainerBoard::new(vm.events(), memory, console_tail)),
                    BoardKind::Pc => {
                        let (board, _) = PcBoard::new(
                            vm.events(),
                            memory,
                            vec![console_tail.clone()],
                            Identity::default(),
                            end,
                        )?;
                        Box::new(board)
                    }
                },
                console_tail: Some(console_tail.clone()),
                agent: Some(stream),
                initramfs: Some(initramfs),
                command_line: CommandLine::Agent(kernel_arguments),
                links: Vec::new(),
                serial_console: None,
                guest_agent: None,
                power_button: None,
            }),
            SoftwareResources::User {
                initramfs,
                command_line,
                identity,
                console_input,
                console_output,
                guest_agent,
                links,
            } => {
                let failed = || device_error("set up the serial console");
                let ring = SerialConsole::create_ring().map_err(failed())?;
                let outputs: Vec<Arc<dyn OutputSink>> = vec![ring.clone(), console_tail.clone()];
                let (board, PcDevices { serial, power_button }) =
                    PcBoard::new(vm.events(), memory, outputs, identity, end)?;
                let console = SerialConsole::new(serial, ring, console_input, console_output);
                Ok(Self {
                    board: Box::new(board),
                    console_tail: None,
                    agent: None,
                    initramfs,
                    command_line: CommandLine::User(command_line),
                    links,
                    serial_console: Some(console.map_err(failed())?),
                    guest_agent,
                    power_button: Some(power_button),
                })
            }
        }
    }
}

/// Puts kernel, initramfs and boot structures into memory. Returns the address of the first instruction.
fn load_software(
    config: &MachineConfig,
    memory: &GuestMemory,
    board: &dyn Board,
    kernel: &File,
    initramfs: Option<(File, Extent)>,
    command_line: &CommandLine,
) -> Result<u64, MachineError> {
    let kernel = boot::kernel::load(memory, kernel, config.kernel)?;
    let initramfs = match initramfs {
        Some((file, extent)) => {
            let address = boot::tables::initramfs_address(config.memory, extent.length, &kernel);
            let address = address.ok_or(BootError::Initramfs)?;
            load_file(memory, "initramfs", &file, extent, address, ExpectedAccess::ReadMostly)?;
            Some(boot::tables::LoadedInitramfs {
                address,
                length: extent.length,
            })
        }
        None => None,
    };
    let command_line = match command_line {
        CommandLine::Agent(arguments) => format!(
            "{COMMAND_LINE}{} maxcpus={} {arguments}",
            board.kernel_arguments(),
            config.vcpus
        ),
        CommandLine::User(line) => line.clone(),
    };
    let information = boot::tables::BootInformation {
        memory: config.memory,
        reserved: board.reserved_addresses(),
        kernel: &kernel,
        command_line: command_line.trim_end(),
        initramfs,
        rsdp: board.acpi_root(),
    };
    boot::tables::write(memory, &information)?;
    board.write_tables(memory, config.max_vcpus)?;
    Ok(kernel.entry)
}

/// The kicks of a device with `N` queues.
fn kicks<const N: usize>(kicks: Vec<EventFd>) -> Result<[EventFd; N], MachineError> {
    let wrong_number = |_| device_error("create the queues of a device")(std::io::ErrorKind::InvalidData.into());
    kicks.try_into().map_err(wrong_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_fills_the_end_of_memory() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        for (memory, expected) in [
            (64 * MIB, 57 * MIB..64 * MIB),
            (512 * MIB, 498 * MIB..512 * MIB),
            (4 * GIB, 5 * GIB - 70 * MIB..5 * GIB),
            // Only a part of it is above the window for devices.
            (3 * GIB + 2 * MIB, 4 * GIB..4 * GIB + 2 * MIB),
        ] {
            assert_eq!(boot_allocations(memory), expected, "{memory:#x}");
        }
    }
}
