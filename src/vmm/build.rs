//! Builds a machine: parses the boot command and its descriptors, then sets up memory, KVM, devices, kernel and vCPUs,
//! in this order.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use nutshell_disk_image::Image;
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
            disks: (0..)
                .zip(&config.disks)
                .map(|(index, access)| open_disk(index, *access, || Ok(next("no file for a disk")?.into())))
                .collect::<Result<_, MachineError>>()?,
            config,
        };
        match descriptors.next() {
            None => Ok(resources),
            Some(_) => Err(MachineError::BootCommand("too many descriptors")),
        }
    }
}

/// Opens the disk number `index`, whose descriptors come from `next_file`.
fn open_disk(
    index: u32,
    access: DiskAccess,
    mut next_file: impl FnMut() -> Result<File, MachineError>,
) -> Result<Backing, MachineError> {
    let base = next_file()?;
    let image = match access {
        DiskAccess::ReadOnly | DiskAccess::ReadWrite => {
            return Ok(Backing::File {
                file: base,
                read_only: access == DiskAccess::ReadOnly,
            });
        }
        DiskAccess::ReadOnlyImage => Image::open_read_only(Box::new(base)),
        DiskAccess::CopyOnWrite { host_boot } => Image::open(Box::new(base), Box::new(next_file()?), host_boot),
    };
    image
        .map(|image| Backing::Image(Box::new(image)))
        .map_err(|source| MachineError::DiskImage {
            serial: disk_serial(index),
            source,
        })
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::Extent;

    fn config(disks: Vec<DiskAccess>) -> MachineConfig {
        let extent = Extent { offset: 0, length: 0 };
        MachineConfig {
            memory: 2 << 20,
            max_memory: 2 << 20,
            vcpus: 1,
            max_vcpus: 1,
            file_server: false,
            disks,
            hotplug_disks: 0,
            kernel: extent,
            initramfs: extent,
            kernel_arguments: String::new(),
        }
    }

    fn parse(disks: Vec<DiskAccess>, files: Vec<File>) -> Result<BootResources, String> {
        let null = || File::open("/dev/null").unwrap().into();
        let mut descriptors: Vec<OwnedFd> = (0..4).map(|_| null()).collect();
        descriptors.extend(files.into_iter().map(OwnedFd::from));
        BootResources::parse(config(disks), descriptors).map_err(|error| error.to_string())
    }

    fn file(size: u64, start: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(start, 0).unwrap();
        file
    }

    #[test]
    fn each_disk_takes_the_descriptors_of_its_kind() {
        let copy_on_write = DiskAccess::CopyOnWrite { host_boot: [1; 16] };
        let disks = vec![
            DiskAccess::ReadWrite,
            copy_on_write,
            DiskAccess::ReadOnlyImage,
            DiskAccess::ReadOnly,
        ];
        // A raw disk stays one, whatever the guest has written to it.
        let files = || {
            vec![
                file(1024, b"QFI\xfb"),
                file(2048, b"base"),
                file(0, b""),
                file(512, b"image"),
                file(1536, b"QFI\xfb"),
            ]
        };

        let resources = parse(disks.clone(), files()).unwrap();

        let found = resources.disks.iter().map(|disk| match disk {
            Backing::File { file, read_only } => ("file", file.metadata().unwrap().len(), *read_only),
            Backing::Image(image) => ("image", image.size(), image.is_read_only()),
        });
        assert!(found.eq([
            ("file", 1024, false),
            ("image", 2048, false),
            ("image", 512, true),
            ("file", 1536, true),
        ]));
        let mut missing = files();
        missing.pop();
        let error = parse(disks, missing).unwrap_err();
        assert_eq!(error, "invalid boot command: no file for a disk");
    }

    #[test]
    fn wrong_image_is_refused_with_disk_field_and_value() {
        let copy_on_write = DiskAccess::CopyOnWrite { host_boot: [1; 16] };
        for (access, files, expected) in [
            (
                DiskAccess::ReadOnlyImage,
                vec![file(72, b"QFI\xfb\0\0\0\x09")],
                "disk nutshell-1: qcow2 base image: version is 9, and only 2 and 3 are supported",
            ),
            (
                copy_on_write,
                vec![file(1000, b""), file(0, b"")],
                "disk nutshell-1: the size of the raw base image is 1000 bytes, not a multiple of 512: \
                 the file may be incomplete",
            ),
            (
                copy_on_write,
                vec![file(512, b""), file(100, b"")],
                "disk nutshell-1: copy-on-write file: its size is 100 bytes instead of 77824: it belongs to another \
                 base image or is incomplete, remove it to start again from the base image",
            ),
        ] {
            let files = std::iter::once(file(512, b"")).chain(files).collect();
            assert_eq!(parse(vec![DiskAccess::ReadOnly, access], files).unwrap_err(), expected);
        }
    }
}
