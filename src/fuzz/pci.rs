//! PCI: both configuration mechanisms, moved windows, MSI-X, and the transport of virtio devices.

use std::{
    io,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
};

use arbitrary::{Result, Unstructured};
use parking_lot::Mutex;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    devices::{
        bus::{Registers, SharedRegisters},
        counters::Counters,
        pci::{
            bus::{ConfigurationPorts, ConfigurationWindow, MemoryWindow, PciBus},
            msix::{Message, MessageVector},
        },
        virtio::{
            device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
            interrupt::Interrupt,
            transport::pci::{Connection, Doorbells, VirtioFunction, WINDOW_SIZE},
        },
    },
    memory::{GuestMemory, MemoryRegions},
};

/// The start of the window in which the windows of functions lie.
const BASE: u32 = 0xc000_0000;
/// The number of device numbers that are accessed: the host bridge, two virtio devices, and one without a device.
const DEVICES: u64 = 4;
const MAX_STEPS: usize = 400;
/// Bits of the message control register of MSI-X.
const MESSAGES_ENABLED: u16 = 1 << 15;
const MESSAGES_MASKED: u16 = 1 << 14;

/// The memory of the guest. A process never unmaps it, so all inputs use the same.
static MEMORY: LazyLock<GuestMemory> =
    LazyLock::new(|| GuestMemory::new(MemoryRegions::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()));

/// A device that keeps the interrupt of its activation.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Option<Arc<dyn Interrupt>>>>);

impl Device for Recorder {
    fn device_id(&self) -> u32 {
        1
    }

    fn counters(&self) -> Arc<Counters> {
        Counters::new("recorder")
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 32]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(b"device conf.", offset, data);
    }

    fn activate(&mut self, activation: Activation) -> std::result::Result<(), ActivateError> {
        assert!(self.0.lock().is_none(), "activated without a reset");
        assert_eq!(activation.features & !COMMON_FEATURES, 0);
        assert!((1..=2).contains(&activation.queues.len()));
        *self.0.lock() = Some(activation.interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        *self.0.lock() = None;
    }
}

/// A vector with the message to which it is connected.
struct Vector {
    event: EventFd,
    connected: Arc<Mutex<Option<Message>>>,
    /// The next connection fails.
    must_fail: Arc<AtomicBool>,
}

impl MessageVector for Vector {
    fn connect(&mut self, message: Message) -> io::Result<()> {
        *self.connected.lock() = None;
        if self.must_fail.swap(false, Ordering::SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        *self.connected.lock() = Some(message);
        Ok(())
    }

    fn disconnect(&mut self) -> io::Result<()> {
        *self.connected.lock() = None;
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

struct Doorbell(Arc<Mutex<Option<u64>>>);

impl Doorbells for Doorbell {
    fn move_to(&mut self, start: Option<u64>, _step: u64) -> io::Result<()> {
        *self.0.lock() = start;
        Ok(())
    }
}

/// A virtio device on the bus, as the machine sees it.
struct Plugged {
    number: u64,
    device: Recorder,
    connected: Vec<Arc<Mutex<Option<Message>>>>,
    must_fail: Arc<AtomicBool>,
    doorbell: Arc<Mutex<Option<u64>>>,
}

struct Machine {
    bus: Arc<PciBus>,
    ports: ConfigurationPorts,
    window: ConfigurationWindow,
    memory: MemoryWindow,
    guest: GuestMemory,
    devices: Vec<Plugged>,
}

/// Interprets `data` as accesses of vCPUs, interrupts of devices, and hot unplug.
///
/// # Panics
///
/// If the two configuration mechanisms differ, an identity changes, or vectors and doorbells do not match the
/// registers.
pub fn access_pci(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut machine = Machine::new();
    for _ in 0..MAX_STEPS {
        // The input may end anywhere.
        if input.is_empty() || machine.step(&mut input).is_err() {
            break;
        }
    }
    machine.check();
}

impl Machine {
    fn new() -> Self {
        let bus = PciBus::new();
        let mut machine = Self {
            ports: ConfigurationPorts::new(bus.clone()),
            window: ConfigurationWindow(bus.clone()),
            memory: MemoryWindow {
                bus: bus.clone(),
                base: BASE.into(),
            },
            bus,
            guest: MEMORY.clone(),
            devices: Vec::new(),
        };
        for number in 1..3 {
            machine.plug(number);
        }
        machine
    }

    fn plug(&mut self, number: u64) {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Recorder::default();
        let must_fail = Arc::new(AtomicBool::new(false));
        let connected: Vec<_> = (0..3).map(|_| Arc::new(Mutex::new(None))).collect();
        let doorbell = Arc::new(Mutex::new(None));
        let vectors = connected.iter().map(|connected| {
            let vector = Vector {
                event: event(),
                connected: connected.clone(),
                must_fail: must_fail.clone(),
            };
            Box::new(vector) as Box<dyn MessageVector>
        });
        let connection = Connection {
            window: BASE + u32::try_from(number).unwrap() * WINDOW_SIZE,
            kicks: vec![event(), event()],
            vectors: vectors.collect(),
            doorbells: Box::new(Doorbell(doorbell.clone())),
        };
        let function = VirtioFunction::new(Box::new(device.clone()), self.guest.clone(), connection).unwrap();
        assert!(self.bus.plug(usize::try_from(number).unwrap(), Box::new(function)));
        self.devices.retain(|plugged| plugged.number != number);
        self.devices.push(Plugged {
            number,
            device,
            connected,
            must_fail,
            doorbell,
        });
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let device = input.int_in_range(0..=DEVICES - 1)?;
        match input.int_in_range(0..=9_u8)? {
            0 => {
                let offset = device << 15 | u64::from(input.arbitrary::<u16>()?) & 0x7fff;
                self.window.write(offset, bytes(input)?);
            }
            1 => {
                let address = 1 << 31 | device << 11 | u64::from(input.arbitrary::<u16>()?) & 0x7fc;
                let enable = input.ratio(9_u8, 10)?;
                let address = u32::try_from(address).unwrap() & if enable { u32::MAX } else { u32::MAX >> 1 };
                self.ports.write(0, &address.to_le_bytes());
                self.ports.write(4 + input.int_in_range(0..=3)?, bytes(input)?);
            }
            2 => {
                let mut data = vec![0; bytes(input)?.len()];
                self.ports.read(input.int_in_range(0..=7)?, &mut data);
            }
            3 | 4 => {
                let offset = device * u64::from(WINDOW_SIZE) + u64::from(register(input)?);
                self.memory.write(offset, bytes(input)?);
            }
            5 => {
                let offset = device * u64::from(WINDOW_SIZE) + u64::from(register(input)?);
                self.memory.read(offset, &mut vec![0; bytes(input)?.len()]);
            }
            6 => {
                let [low, high] = input.arbitrary::<[u8; 2]>()?;
                // Decoding, bus mastering, and an address in BAR 0 at which the windows of devices may overlap.
                self.window.write(device << 15 | 4, &[low & 7, 0]);
                self.window.write(device << 15 | 0x10, &[0, 0, high % 8, 0xc0]);
            }
            7 => self.start_driver(device, input.int_in_range(1..=16_u64)?),
            8 => {
                for plugged in self.devices.iter().filter(|plugged| plugged.number == device) {
                    if let Some(interrupt) = &*plugged.device.0.lock() {
                        interrupt.notify_used(input.int_in_range(0..=3)?);
                        interrupt.notify_config_change();
                        drop(interrupt.delegate(input.int_in_range(0..=3)?).unwrap());
                    }
                    plugged.must_fail.store(input.ratio(1_u8, 4)?, Ordering::SeqCst);
                }
            }
            _ if (1..3).contains(&device) => {
                self.bus.unplug(usize::try_from(device).unwrap());
                self.plug(device);
            }
            _ => self.check(),
        }
        Ok(())
    }

    /// Enables the device and negotiates up to DRIVER_OK, as a driver does, but stops after `steps` writes. The offsets
    /// are those of the common configuration (virtio 1.3 §4.1.4.3).
    fn start_driver(&mut self, device: u64, steps: u64) {
        self.window.write(device << 15 | 4, &[6, 0]);
        let mut base = [0; 4];
        self.window.read(device << 15 | 0x10, &mut base);
        let base = u64::from(u32::from_le_bytes(base) & !0xf).wrapping_sub(BASE.into());
        let writes: [(u64, &[u8]); 16] = [
            (20, &[0]),
            (20, &[1]),
            (20, &[3]),
            (8, &[0; 4]),
            (12, &COMMON_FEATURES.to_le_bytes()[..4]),
            (8, &[1, 0, 0, 0]),
            (12, &COMMON_FEATURES.to_le_bytes()[4..]),
            (20, &[11]),
            (22, &[0; 2]),
            (24, &[16, 0]),
            (26, &[1, 0]),
            (32, &[0, 0x10, 0, 0, 0, 0, 0, 0]),
            (40, &[0, 0x20, 0, 0, 0, 0, 0, 0]),
            (48, &[0, 0x30, 0, 0, 0, 0, 0, 0]),
            (28, &[1, 0]),
            (20, &[15]),
        ];
        for (offset, data) in writes.iter().take(usize::try_from(steps).unwrap()) {
            if base < 0x1000_0000 {
                self.memory.write(base + offset, data);
            }
        }
    }

    fn check(&mut self) {
        for device in 0..DEVICES {
            let (mut by_window, mut by_ports) = ([0; 4], [0; 4]);
            for register in (0..0x100_u64).step_by(4) {
                let address = 1 << 31 | device << 11 | register;
                self.window.read(device << 15 | register, &mut by_window);
                self.ports.write(0, &u32::try_from(address).unwrap().to_le_bytes());
                self.ports.read(4, &mut by_ports);
                assert_eq!(by_window, by_ports, "device {device}, register {register:#x}");
            }
        }
        for plugged in &self.devices {
            let read = |register: u64| {
                let mut data = [0; 4];
                self.window.read(plugged.number << 15 | register, &mut data);
                u32::from_le_bytes(data)
            };
            assert_eq!(read(0), 0x1041_1af4);
            let window = (read(4) & 2 != 0).then_some(u64::from(read(0x10) & !0xf));
            assert_eq!(*plugged.doorbell.lock(), window.map(|start| start + 0x3000));
            // MSI-X is the first capability.
            let control = (read(0x40) >> 16) as u16;
            let is_open = control & (MESSAGES_ENABLED | MESSAGES_MASKED) == MESSAGES_ENABLED;
            let is_connected = plugged.connected.iter().any(|message| message.lock().is_some());
            assert!(is_open || !is_connected, "a masked function is connected");
        }
    }
}

/// The bytes of an access.
fn bytes<'a>(input: &mut Unstructured<'a>) -> Result<&'a [u8]> {
    let sizes = [1, 2, 4, 8, 4, 2, 1, 3, 16];
    let size = *input.choose(&sizes)?;
    input.bytes(size)
}

/// An offset in a window, often one with a register.
fn register(input: &mut Unstructured<'_>) -> Result<u16> {
    let part = *input.choose(&[0, 0, 0x1000, 0x2000, 0x3000, 0x5000, 0x6000, 0x6000, 0xe000])?;
    Ok(part | u16::from(input.arbitrary::<u8>()? & 0x3f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_of_the_fuzz_target_activates_its_device() {
        let mut machine = Machine::new();

        machine.start_driver(1, 16);

        assert!(machine.devices[0].device.0.lock().is_some());
        machine.check();
    }
}
