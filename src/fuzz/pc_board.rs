//! The registers of the PC board's devices at I/O ports.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use arbitrary::{Result, Unstructured};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::{
    bus::Bus,
    output_sink::OutputSink,
    pc::{
        ged::GenericEvents,
        pm_timer::PmTimer,
        power::{Power, PowerRequest},
        serial::Serial,
    },
};

const MAX_STEPS: usize = 1000;
/// The distance between the first ports of two devices. It leaves unused ports behind each device.
const DISTANCE: u64 = 16;

/// Counts the bytes of the guest's output.
#[derive(Debug, Default)]
struct Count(AtomicUsize);

impl OutputSink for Count {
    fn append(&self, bytes: &[u8]) {
        self.0.fetch_add(bytes.len(), Ordering::SeqCst);
    }
}

/// Interprets `data` as accesses to ports, input of the console, and presses of the power button.
///
/// # Panics
///
/// If the guest causes more output or requests than it has written bytes, or an event is lost.
pub fn access_pc_board(data: &[u8]) {
    // The input may end anywhere.
    let _ = run(&mut Unstructured::new(data));
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let output = Arc::new(Count::default());
    let serial = Serial::new(event(), vec![output.clone() as Arc<dyn OutputSink>]).unwrap();
    let events = GenericEvents::new(event());
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = requests.clone();
    let power = Power::new(move |request| {
        assert!(matches!(request, PowerRequest::Reset | PowerRequest::PowerOff));
        seen.fetch_add(1, Ordering::SeqCst);
    });
    let mut bus = Bus::default();
    bus.add(0..DISTANCE, Box::new(serial.clone()));
    bus.add(DISTANCE..2 * DISTANCE, Box::new(power));
    bus.add(2 * DISTANCE..3 * DISTANCE, Box::new(PmTimer::new()));
    bus.add(3 * DISTANCE..4 * DISTANCE, Box::new(events.clone()));
    let (mut written, mut writes) = (0, 0);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let port = u64::from(input.int_in_range(0..=4 * 16 + 3_u8)?);
        match input.int_in_range(0..=7_u8)? {
            0..=3 => {
                let size = *input.choose(&[1, 1, 1, 2, 4, 8, 64])?;
                let bytes = input.bytes(size)?;
                bus.write(port, bytes);
                (written, writes) = (written + size, writes + 1);
            }
            4 | 5 => bus.read(port, &mut vec![0xee; *input.choose(&[1, 1, 2, 4, 8, 300])?]),
            6 => {
                let size = usize::from(input.int_in_range(0..=100_u8)?);
                assert!(serial.send_input(&vec![b'i'; size]) <= size.min(64));
            }
            _ => {
                events.press_power_button().unwrap();
                let mut pending = [0xff];
                bus.read(3 * DISTANCE, &mut pending);
                assert_eq!(pending, [1]);
                bus.read(3 * DISTANCE, &mut pending);
                assert_eq!(pending, [0]);
            }
        }
    }
    assert!(output.0.load(Ordering::SeqCst) <= written);
    assert!(requests.load(Ordering::SeqCst) <= writes);
    Ok(())
}
