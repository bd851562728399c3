use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::devices::{
    counters::Counters,
    log_capture::LogCapture,
    pci::msix::{Message, mock::MockVector},
    virtio::{
        device::{ActivateError, Activation, COMMON_FEATURES, copy_config},
        mock::memory,
    },
};

const COMMAND: usize = 4;
const BAR: usize = 0x10;
const CONFIG: [u8; 12] = *b"device conf.";
const BASE: u32 = 0xc001_0000;
const NO_VECTOR: u64 = 0xffff;
const UP_TO_FEATURES: u64 = 11;
const UP_TO_DRIVER_OK: u64 = 15;

/// A device with two queues that keeps its activation.
#[derive(Default, Clone)]
struct Recorder {
    activation: Arc<Mutex<Option<Activation>>>,
    resets: Arc<AtomicUsize>,
}

impl Device for Recorder {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn counters(&self) -> Arc<Counters> {
        Counters::new("recorder")
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 32]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&CONFIG, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        *self.activation.lock() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Default, Clone)]
struct RecordedDoorbells(Arc<Mutex<Vec<Option<u64>>>>);

impl Doorbells for RecordedDoorbells {
    fn move_to(&mut self, start: Option<u64>, _step: u64) -> io::Result<()> {
        self.0.lock().push(start);
        Ok(())
    }
}

struct Fixture {
    function: VirtioFunction,
    device: Recorder,
    kicks: Vec<EventFd>,
    connected: Vec<Arc<Mutex<Option<Message>>>>,
    doorbells: RecordedDoorbells,
}

fn fixture() -> Fixture {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (device, doorbells) = (Recorder::default(), RecordedDoorbells::default());
    let kicks = vec![event(), event()];
    let (vectors, connected) = (0..3).map(|_| MockVector::pair()).unzip();
    let connection = Connection {
        window: BASE,
        kicks: kicks.iter().map(|kick| kick.try_clone().unwrap()).collect(),
        vectors,
        doorbells: Box::new(doorbells.clone()),
    };
    let function = VirtioFunction::new(Box::new(device.clone()), memory(), connection).unwrap();
    Fixture {
        function,
        device,
        kicks,
        connected,
        doorbells,
    }
}

impl Fixture {
    fn read(&mut self, (offset, size): (u64, usize)) -> u64 {
        let mut bytes = [0; 8];
        self.function.read_window(offset, &mut bytes[..size]);
        u64::from_le_bytes(bytes)
    }

    fn write(&mut self, (offset, size): (u64, usize), value: u64) {
        self.function.write_window(offset, &value.to_le_bytes()[..size]);
    }

    fn configuration(&mut self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.function.read_configuration(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The offsets of all capabilities with their IDs.
    fn capabilities(&mut self) -> Vec<(usize, u8)> {
        let mut found = Vec::new();
        let mut offset = usize::from(self.configuration(0x34).to_le_bytes()[0]);
        while offset != 0 {
            let [id, next, ..] = self.configuration(offset).to_le_bytes();
            found.push((offset, id));
            offset = next.into();
        }
        found
    }

    /// The driver's steps up to FEATURES_OK.
    fn negotiate(&mut self) {
        for status in [1, 3] {
            self.write(register::DEVICE_STATUS, status);
        }
        for half in 0..2 {
            self.write(register::DRIVER_FEATURE_SELECT, half);
            self.write(register::DRIVER_FEATURE, COMMON_FEATURES >> (32 * half) & 0xffff_ffff);
        }
        self.write(register::DEVICE_STATUS, UP_TO_FEATURES);
        assert_eq!(self.read(register::DEVICE_STATUS), UP_TO_FEATURES);
    }

    /// Configures and enables queue `index`, whose interrupts use the vector index + 1.
    fn enable_queue(&mut self, index: u64) {
        self.write(register::QUEUE_SELECT, index);
        self.write(register::QUEUE_SIZE, 16);
        self.write(register::QUEUE_MSIX_VECTOR, index + 1);
        let area = index * 0x8000;
        self.write((register::QUEUE_DESC, 8), area);
        self.write((register::QUEUE_DRIVER, 4), area + 0x1000);
        self.write((register::QUEUE_DRIVER + 4, 4), 0);
        self.write((register::QUEUE_DEVICE, 8), area + 0x2000);
        self.write(register::QUEUE_ENABLE, 1);
    }
}

#[test]
fn driver_finds_all_structures_by_their_capabilities() {
    let mut fixture = fixture();
    assert_eq!(fixture.configuration(0), 0x1041_1af4);
    assert_eq!(fixture.configuration(8), 0x0200_0001);
    let mut found = Vec::new();
    for (offset, id) in fixture.capabilities() {
        let [_, _, length, kind] = fixture.configuration(offset).to_le_bytes();
        match id {
            9 => {
                let place = (fixture.configuration(offset + 8), fixture.configuration(offset + 12));
                found.push((kind, length, place));
            }
            0x11 => assert_eq!(length, 2, "the last vector"),
            other => panic!("capability {other:#x}"),
        }
    }
    found.sort_unstable();
    let expected = [
        (1, 16, (0, 0x1000)),
        (2, 20, (0x3000, 0x2000)),
        (3, 16, (0x1000, 0x1000)),
        (4, 16, (0x2000, 0x1000)),
        (5, 20, (0, 0)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn driver_negotiates_and_activates_the_device() {
    let mut fixture = fixture();
    assert_eq!(fixture.read(register::NUM_QUEUES), 2);
    assert_eq!(fixture.read(register::QUEUE_SIZE), 64, "the maximum at first");
    fixture.write(register::DEVICE_FEATURE_SELECT, 1);
    assert_eq!(fixture.read(register::DEVICE_FEATURE), COMMON_FEATURES >> 32);
    fixture.negotiate();
    fixture.enable_queue(0);
    fixture.enable_queue(1);
    assert_eq!(fixture.read(register::QUEUE_NOTIFY_OFF), 1);
    assert_eq!(fixture.read(register::QUEUE_ENABLE), 1);
    assert_eq!(fixture.read((register::QUEUE_DESC, 8)), 0x8000);
    assert_eq!(fixture.read((register::QUEUE_DRIVER, 8)), 0x9000);

    fixture.write(register::DEVICE_STATUS, UP_TO_DRIVER_OK);

    let activation = fixture.device.activation.lock().take().unwrap();
    assert_eq!(activation.queues.len(), 2);
    assert_eq!(activation.features, COMMON_FEATURES);
    assert_eq!(fixture.read(register::DEVICE_STATUS), UP_TO_DRIVER_OK);

    fixture.write(register::DEVICE_STATUS, 0);

    assert_eq!(fixture.device.resets.load(Ordering::SeqCst), 1);
    assert_eq!(fixture.read(register::DEVICE_STATUS), 0);
    assert_eq!(fixture.read(register::QUEUE_SELECT), 0);
    assert_eq!(fixture.read(register::QUEUE_MSIX_VECTOR), NO_VECTOR);
}

/// In another monitor, the size of a queue could change after its ring addresses had been checked for the old size.
#[test]
fn no_register_changes_a_queue_after_activation_cve_2026_5747() {
    let mut fixture = fixture();
    fixture.negotiate();
    fixture.enable_queue(0);
    fixture.write(register::DEVICE_STATUS, UP_TO_DRIVER_OK);
    let activated = |fixture: &Fixture| {
        let activation = fixture.device.activation.lock();
        let queue = activation.as_ref().unwrap().queues[0].configuration();
        (queue.size(), queue.desc_table(), queue.avail_ring(), queue.used_ring())
    };
    let before = activated(&fixture);
    assert_eq!(before, (16, 0, 0x1000, 0x2000));

    // Queue 0 is enabled, queue 1 is not.
    for index in 0..2 {
        fixture.write(register::QUEUE_SELECT, index);
        let read = |fixture: &mut Fixture| {
            let areas = [register::QUEUE_DESC, register::QUEUE_DRIVER, register::QUEUE_DEVICE];
            let addresses = areas.map(|area| fixture.read((area, 8)));
            let (size, enabled) = (fixture.read(register::QUEUE_SIZE), fixture.read(register::QUEUE_ENABLE));
            (size, enabled, addresses)
        };
        let registers = read(&mut fixture);
        for status in [UP_TO_FEATURES, UP_TO_DRIVER_OK] {
            fixture.write(register::DEVICE_STATUS, status);
            for size in [0, 1, 8, 32, 0x8000, 0xffff] {
                fixture.write(register::QUEUE_SIZE, size);
            }
            for area in [register::QUEUE_DESC, register::QUEUE_DRIVER, register::QUEUE_DEVICE] {
                fixture.write((area, 8), 0xdead_beef_0000);
                fixture.write((area + 4, 4), 1);
            }
            for enabled in [0, 1] {
                fixture.write(register::QUEUE_ENABLE, enabled);
            }
            assert_eq!(read(&mut fixture), registers, "queue {index}");
            assert_eq!(activated(&fixture), before, "queue {index}");
            assert_eq!(fixture.read(register::DEVICE_STATUS), UP_TO_DRIVER_OK);
        }
    }
    assert_eq!(fixture.device.resets.load(Ordering::SeqCst), 0);
}

#[test]
fn device_stops_when_it_may_no_longer_access_memory() {
    let mut fixture = fixture();
    fixture.function.write_configuration(COMMAND, &[6, 0]);
    fixture.negotiate();
    fixture.enable_queue(0);
    fixture.write(register::DEVICE_STATUS, UP_TO_DRIVER_OK);

    fixture.function.write_configuration(COMMAND, &[2, 0]);

    assert_eq!(fixture.device.resets.load(Ordering::SeqCst), 1);
    assert_eq!(fixture.read(register::DEVICE_STATUS), 0);
    fixture.function.write_configuration(COMMAND, &[6, 0]);
    fixture.function.write_configuration(COMMAND, &[6, 4]);
    assert_eq!(fixture.device.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn queues_interrupt_by_the_vectors_that_the_driver_chose() {
    let mut fixture = fixture();
    fixture.negotiate();
    fixture.enable_queue(0);
    fixture.enable_queue(1);
    fixture.write(register::CONFIG_MSIX_VECTOR, 0);
    fixture.write(register::QUEUE_SELECT, 1);
    fixture.write(register::QUEUE_MSIX_VECTOR, 3);
    assert_eq!(
        fixture.read(register::QUEUE_MSIX_VECTOR),
        NO_VECTOR,
        "there are three vectors"
    );
    fixture.write(register::DEVICE_STATUS, UP_TO_DRIVER_OK);
    let interrupt = fixture.device.activation.lock().as_ref().unwrap().interrupt.clone();
    let pending = |fixture: &mut Fixture| fixture.read((PENDING_BITS.start, 1));

    interrupt.notify_used(1);
    interrupt.notify_used(2);
    assert_eq!(
        pending(&mut fixture),
        0,
        "queue 1 has no vector, queue 2 does not exist"
    );
    interrupt.notify_config_change();
    assert_eq!(pending(&mut fixture), 0b001);
    interrupt.delegate(0).unwrap().write(1).unwrap();
    assert_eq!(pending(&mut fixture), 0b011);
    interrupt.delegate(1).unwrap().write(1).unwrap();
    assert_eq!(pending(&mut fixture), 0b011, "the driver polls queue 1");

    // The driver enables MSI-X and unmasks vector 1.
    let (capability, _) = fixture.capabilities().into_iter().find(|(_, id)| *id == 0x11).unwrap();
    fixture.function.write_configuration(capability + 2, &[0, 0x80]);
    fixture.write((MESSAGE_TABLE.start + 16, 8), 0xfee0_0000);
    fixture.write((MESSAGE_TABLE.start + 24, 4), 0x31);
    fixture.write((MESSAGE_TABLE.start + 28, 4), 0);
    let message = Message {
        address: 0xfee0_0000,
        data: 0x31,
    };
    assert_eq!(*fixture.connected[1].lock(), Some(message));
    assert_eq!(pending(&mut fixture), 0b001);
    fixture.write(register::DEVICE_STATUS, 0);
    assert_eq!(pending(&mut fixture), 0);
}

#[test]
fn doorbells_follow_the_window() {
    let mut fixture = fixture();
    let doorbell = |base: u32| Some(u64::from(base) + NOTIFY.start);
    fixture.function.write_configuration(COMMAND, &[6, 0]);
    fixture.function.write_configuration(COMMAND, &[6, 4]);
    fixture
        .function
        .write_configuration(BAR, &0xd000_0000_u32.to_le_bytes());
    fixture.function.write_configuration(COMMAND, &[0, 0]);
    fixture.function.write_configuration(BAR, &u32::MAX.to_le_bytes());
    fixture
        .function
        .write_configuration(BAR, &0xc800_0000_u32.to_le_bytes());
    fixture.function.write_configuration(COMMAND, &[2, 0]);
    let expected = [doorbell(BASE), doorbell(0xd000_0000), None, doorbell(0xc800_0000)];
    assert_eq!(*fixture.doorbells.0.lock(), expected);

    // A notification that KVM did not take.
    fixture.write((NOTIFY.start + 4, 2), 1);
    assert_eq!(fixture.kicks[1].read().unwrap(), 1);
    assert!(fixture.kicks[0].read().is_err());
    for queue in [2, 0x7ff] {
        fixture.write((NOTIFY.start + queue * 4, 2), queue);
    }
}

#[test]
fn window_is_reachable_through_the_configuration_space() {
    let mut fixture = fixture();
    let access = |fixture: &mut Fixture, bar: u8, offset: u32, length: u32| {
        let (capability, _) = fixture.capabilities()[1];
        fixture.function.write_configuration(capability + 4, &[bar]);
        fixture
            .function
            .write_configuration(capability + 8, &offset.to_le_bytes());
        fixture
            .function
            .write_configuration(capability + 12, &length.to_le_bytes());
        capability + 16
    };
    let data = access(&mut fixture, 0, 0x2000, 4);
    assert_eq!(fixture.configuration(data).to_le_bytes(), CONFIG[..4]);
    let data = access(&mut fixture, 0, 20, 1);
    fixture.function.write_configuration(data, &[1]);
    assert_eq!(fixture.read(register::DEVICE_STATUS), 1);
    assert_eq!(fixture.configuration(data) & 0xff, 1);
    for (bar, offset, length) in [
        (1, 20, 1),
        (0, WINDOW_SIZE, 1),
        (0, WINDOW_SIZE - 2, 4),
        (0, u32::MAX, 4),
        (0, 20, 0),
        (0, 20, 3),
        (0, 20, u32::MAX),
    ] {
        let data = access(&mut fixture, bar, offset, length);
        fixture.function.write_configuration(data, &[0]);
        assert_eq!(fixture.read(register::DEVICE_STATUS), 1, "{bar} {offset:#x} {length}");
    }
}

#[test]
fn random_accesses_do_not_panic_and_the_device_works_after_a_reset() {
    let _log = LogCapture::on_this_thread("recorder");
    let mut fixture = fixture();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200_000 {
        let value = random().to_le_bytes();
        let length = [1, 2, 4, 8][(random() % 4) as usize];
        let mut data = [0; 8];
        match random() % 4 {
            0 => fixture
                .function
                .write_configuration((random() % 0x1010) as usize, &value[..length.min(4)]),
            1 => fixture
                .function
                .read_configuration((random() % 0x1010) as usize, &mut data[..length.min(4)]),
            2 => {
                let range = if random() % 2 == 0 { 64 } else { u64::from(WINDOW_SIZE) };
                fixture.function.write_window(random() % range, &value[..length]);
            }
            _ => fixture
                .function
                .read_window(random() % u64::from(WINDOW_SIZE), &mut data[..length]),
        }
    }
    fixture.write(register::DEVICE_STATUS, 0);
    fixture.negotiate();
}
