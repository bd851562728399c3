//! Puts a machine together from what the shim sent: parses the boot command and its descriptors
//! into types, then memory, KVM, devices, kernel and processors, in that order.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
};

use nutshell_protocol::{AGENT_PORT, LINK_SLOTS, SHARE_TAG, disk_serial};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{
    boot::{self, BootError, kernel::KernelError},
    control::{self, Machine},
    disk_slots::DiskSlots,
    end::End,
    growth::{Around, Growth},
    kvm::{self, KvmError, Vm},
    memory::{self, Access, MMIO, MemoryError},
    vcpu::{self, Peripherals},
};
use crate::devices::{
    bus::Bus,
    uart::Uart,
    virtio::{
        Device, GuestMemory, Handle,
        balloon::Balloon,
        block::{Backing, Block, Disk},
        console::{Console, Log},
        fs::Fs,
        mmio::{Line, Mmio, NOTIFY, Slot, WINDOW},
        net::Net,
        rng::Rng,
        vsock::{Vsock, muxer::Muxer},
    },
};

/// The first interrupt line given to a device: lower ones are those of the PC's first devices.
const FIRST_LINE: u32 = 5;

/// What every kernel is told. Quiet before the early console, which else prints all; a panic or
/// halt resets at once by triple fault, which ends the machine; no probing for a timer that KVM's
/// clock makes superfluous. No network device that nobody asked for.
const COMMAND_LINE: &str = "quiet console=hvc0 earlyprintk=serial,ttyS0,115200 panic=-1 reboot=t no_timer_check \
                            tsc=reliable cryptomgr.notests random.trust_cpu=on \
                            dummy.numdummies=0 ifb.numifbs=0 fb_tunnels=none";

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// Not what a shim of this version sends.
    #[error("the boot command does not fit its descriptors: {0}")]
    Command(&'static str),
    /// The guest cannot be made to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be made.
    #[error("{what}: {source}")]
    Device {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file server does not take the machine's memory.
    #[error("the file server does not take more guest memory: {0}")]
    FileServer(String),
    /// A slot that does not exist, or is taken.
    #[error("there is no empty slot {0} for a device of this kind")]
    Slot(u32),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A boot command and its descriptors as types.
#[derive(Debug)]
pub(crate) struct Parts {
    machine: Machine,
    kvm: OwnedFd,
    kernel: File,
    initramfs: File,
    agent: OwnedFd,
    share: Option<UnixStream>,
    disks: Vec<Backing>,
}

impl Parts {
    /// Pairs the command with its descriptors, in the order that [`control::Command::Boot`] says.
    pub(crate) fn parse(machine: Machine, descriptors: Vec<OwnedFd>) -> Result<Self, BuildError> {
        let mut descriptors = descriptors.into_iter();
        let mut next = |what| descriptors.next().ok_or(BuildError::Command(what));
        let parts = Self {
            kvm: next("no /dev/kvm")?,
            kernel: next("no kernel")?.into(),
            initramfs: next("no initramfs")?.into(),
            agent: next("no stream for the agent")?,
            share: if machine.share {
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
                        read_only: *disk == control::Disk::ReadOnly,
                    })
                })
                .collect::<Result<_, BuildError>>()?,
            machine,
        };
        match descriptors.next() {
            None if parts.machine.vcpus > 0 && parts.machine.most_vcpus >= parts.machine.vcpus => Ok(parts),
            None => Err(BuildError::Command("no vCPU")),
            Some(_) => Err(BuildError::Command("a descriptor too many")),
        }
    }
}

/// A running machine, as the event loop drives it.
#[derive(Debug)]
pub(crate) struct Running {
    /// KVM takes the irqfds back when its descriptor is closed, while vCPUs still run.
    vm: Vm,
    memory: GuestMemory,
    peripherals: Arc<Peripherals>,
    end: Arc<End>,
    /// Places for network devices.
    links: Vec<Place>,
    disk_slots: DiskSlots,
    growth: Growth,
    fs: Option<Handle<Fs>>,
    pub(crate) vsock: Handle<Vsock>,
    pub(crate) vsock_receive: EventFd,
    pub(crate) vsock_transmit: EventFd,
    pub(crate) console: Handle<Console>,
    pub(crate) console_transmit: EventFd,
    pub(crate) rng: Handle<Rng>,
    pub(crate) rng_request: EventFd,
    pub(crate) balloon: Handle<Balloon>,
    pub(crate) balloon_report: EventFd,
    /// Each in its disk slot.
    pub(crate) disks: BTreeMap<u32, Disk>,
}

/// Where a device is on the bus.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    pub(super) base: u64,
    pub(super) line: u32,
}

/// A place for a device that comes later.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) address: Address,
    pub(super) slot: Slot,
}

impl Running {
    /// Puts a network device into an empty slot; the guest's driver finds it when it looks again.
    pub(crate) fn plug_link(&self, slot: u32, mac: [u8; 6], mtu: u16, queues: Vec<OwnedFd>) -> Result<(), BuildError> {
        let place = self.links.get(slot as usize).filter(|place| place.slot.is_empty());
        let place = place.ok_or(BuildError::Slot(slot))?;
        let net = Net::new(mac, mtu, queues).map_err(device("tap device"))?;
        let (kicks, line) = (kicks_of(&net)?, Arc::new(Line::new(eventfd()?)));
        let transport = connect(&self.vm, &self.memory, place.address, Box::new(net), line, kicks)?;
        if place.slot.fill(transport) {
            Ok(())
        } else {
            Err(BuildError::Slot(slot))
        }
    }

    /// Puts a disk into an empty disk slot, in the same way.
    pub(crate) fn plug_disk(&mut self, slot: u32, backing: Backing) -> Result<(), BuildError> {
        let disk = Disk::new(disk_serial(slot), backing).map_err(device("disk"))?;
        self.disk_slots.plug(slot, disk.clone(), &self.vm, &self.memory)?;
        self.disks.insert(slot, disk);
        Ok(())
    }

    /// Forgets the disk in a slot; what is returned is to be emptied, and another may have the slot then.
    pub(crate) fn forget_disk(&mut self, slot: u32) -> Option<Slot> {
        let place = self.disk_slots.place(slot)?;
        self.disks.remove(&slot);
        Some(place)
    }

    /// See [`control::Command::Resize`].
    pub(crate) fn resize(&mut self, bytes: u64, vcpus: u8) -> Result<(), BuildError> {
        let around = Around {
            vm: &mut self.vm,
            memory: &self.memory,
            fs: self.fs.as_ref(),
            peripherals: &self.peripherals,
            end: &self.end,
        };
        self.growth.resize(bytes, vcpus, around)
    }

    /// The same, to change it.
    pub(crate) fn growth_mut(&mut self) -> &mut Growth {
        &mut self.growth
    }

    /// What can be added while the machine runs.
    pub(crate) fn growth(&self) -> &Growth {
        &self.growth
    }
}

/// An eventfd for each queue.
pub(super) fn kicks_of(virtio: &dyn Device) -> Result<Vec<EventFd>, BuildError> {
    virtio.queue_sizes().iter().map(|_| eventfd()).collect()
}

/// Gives a device its interrupt line and the kick of each queue.
pub(super) fn connect(
    vm: &Vm,
    memory: &GuestMemory,
    address: Address,
    virtio: Box<dyn Device>,
    line: Arc<Line>,
    kicks: Vec<EventFd>,
) -> Result<Mmio, BuildError> {
    vm.interrupt_on(line.irqfd(), address.line)?;
    for (queue, kick) in (0..).zip(&kicks) {
        vm.signal_on_write(kick, address.base + NOTIFY, queue)?;
    }
    Ok(Mmio::new(virtio, memory.clone(), line, kicks))
}

pub(super) fn eventfd() -> Result<EventFd, BuildError> {
    EventFd::new(EFD_CLOEXEC).map_err(device("eventfd"))
}

/// Builds the machine and lets its processors run; what ends it is reported to `end`, and what it
/// prints goes to `log`.
pub(crate) fn start(parts: Parts, log: &Arc<Log>, end: &Arc<End>) -> Result<Running, BuildError> {
    let Parts {
        machine,
        kvm,
        kernel,
        initramfs,
        agent,
        share,
        disks,
    } = parts;
    let memory = GuestMemory::new(memory::allocate(machine.memory, machine.share)?);
    let vm = Vm::new(kvm, memory.now())?;
    let mut board = Board::new(&vm, memory.clone());

    // First: their names in the guest are numbers (see `slot_device`).
    let links = (0..LINK_SLOTS)
        .map(|_| board.reserve())
        .collect::<Result<Vec<_>, _>>()?;
    let growth = Growth::new(&machine, board.reserve()?)?;
    let free_disks = (0..machine.free_disks)
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
            let line = Arc::new(Line::always_used(eventfd()?));
            let fs = Handle::new(Fs::new(SHARE_TAG, socket, line.clone()));
            board.add_with_line(Box::new(fs.clone()), line)?;
            Some(fs)
        }
        None => None,
    };
    let disks = (0..)
        .zip(disks)
        .map(|(slot, backing)| {
            let disk = Disk::new(disk_serial(slot), backing).map_err(device("disk"))?;
            board.add(Box::new(Block::new(disk.clone(), machine.vcpus.into())))?;
            Ok((slot, disk))
        })
        .collect::<Result<BTreeMap<_, _>, BuildError>>()?;

    let free_slot = disks.keys().next_back().map_or(0, |last| last + 1);
    let loaded = boot::kernel::load(&memory, &kernel, machine.kernel)?;
    let place = boot::initramfs_address(machine.memory, machine.initramfs.length)
        .filter(|address| *address >= loaded.end)
        .ok_or(BuildError::Command("the initramfs does not fit into guest memory"))?;
    memory::load(&memory, "initramfs", &initramfs, machine.initramfs, place, Access::Read)?;
    let archive = boot::Initramfs {
        address: place,
        length: machine.initramfs.length,
    };
    let command_line = format!(
        "{COMMAND_LINE}{} maxcpus={} {}",
        board.arguments, machine.vcpus, machine.kernel_arguments
    );
    boot::write_tables(&memory, machine.memory, command_line.trim_end(), archive)?;
    boot::mptable::write(&memory, machine.most_vcpus).map_err(BootError::from)?;

    let peripherals = Arc::new(Peripherals {
        bus: board.bus,
        uart: Mutex::new(Uart::new(log.clone())),
    });
    for (index, vcpu) in vm
        .create_vcpus(0..machine.vcpus, machine.most_vcpus)?
        .into_iter()
        .enumerate()
    {
        if index == 0 {
            kvm::set_entry(&vcpu, loaded.entry)?;
        }
        vcpu::start(index, vcpu, peripherals.clone(), end.clone()).map_err(device("vCPU thread"))?;
    }
    let kick = |kicks: &mut std::vec::IntoIter<EventFd>| kicks.next().ok_or(BuildError::Command("no queue"));
    Ok(Running {
        vm,
        memory,
        peripherals,
        end: end.clone(),
        links,
        disk_slots: DiskSlots::new(free_slot, free_disks, machine.vcpus.into()),
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
        disks,
    })
}

/// Where devices are plugged in: gives each a window, an interrupt line, kicks, and the words of
/// the command line by which the kernel finds it (`virtio_mmio.device=`).
struct Board<'v> {
    vm: &'v Vm,
    memory: GuestMemory,
    bus: Bus,
    arguments: String,
    count: u32,
}

impl<'v> Board<'v> {
    fn new(vm: &'v Vm, memory: GuestMemory) -> Self {
        Self {
            vm,
            memory,
            bus: Bus::default(),
            arguments: String::new(),
            count: 0,
        }
    }

    fn add(&mut self, device: Box<dyn Device>) -> Result<Vec<EventFd>, BuildError> {
        let line = Arc::new(Line::new(eventfd()?));
        self.add_with_line(device, line)
    }

    /// Returns the kick of each queue.
    fn add_with_line(&mut self, virtio: Box<dyn Device>, line: Arc<Line>) -> Result<Vec<EventFd>, BuildError> {
        let address = self.address()?;
        let kicks = kicks_of(&*virtio)?;
        let clones = kicks
            .iter()
            .map(|kick| kick.try_clone().map_err(device("eventfd")))
            .collect::<Result<_, _>>()?;
        let transport = connect(self.vm, &self.memory, address, virtio, line, kicks)?;
        self.bus.add(address.base..address.base + WINDOW, Box::new(transport));
        Ok(clones)
    }

    /// Keeps a place for a device that comes later.
    fn reserve(&mut self) -> Result<Place, BuildError> {
        let (address, slot) = (self.address()?, Slot::default());
        self.bus
            .add(address.base..address.base + WINDOW, Box::new(slot.clone()));
        Ok(Place { address, slot })
    }

    /// The next window and line, of which the kernel is told.
    fn address(&mut self) -> Result<Address, BuildError> {
        use std::fmt::Write;

        let line = FIRST_LINE + self.count;
        if line >= u32::from(boot::mptable::LINES) {
            return Err(BuildError::Command("more devices than interrupt lines"));
        }
        let base = MMIO.start + u64::from(self.count) * WINDOW;
        self.count += 1;
        // Writing to a string cannot fail.
        let _ = write!(self.arguments, " virtio_mmio.device={WINDOW}@{base:#x}:{line}");
        Ok(Address { base, line })
    }
}

pub(super) fn device(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Device { what, source }
}
