//! The serial port COM1: a 16550A UART with an interrupt, for the guest's console. Unlike [`crate::devices::uart`], it
//! takes input.

use std::{
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use parking_lot::Mutex;
use vm_superio::{Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::{bus::Registers, counters::Counters, output_sink::OutputSink};

/// The offset of the modem control register, and its bit for loopback mode.
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;
/// The size of the receive buffer in bytes.
const FIFO_SIZE: usize = 64;

type UartError = vm_superio::serial::Error<io::Error>;

/// The serial port. Clones share it: one on the bus, one in the event loop.
#[derive(Clone)]
pub(crate) struct Serial {
    shared: Arc<Shared>,
}

struct Shared {
    port: Mutex<Port>,
    /// Readable if input that was refused can be sent again.
    input_ready: EventFd,
    counters: Arc<Counters>,
}

struct Port {
    uart: vm_superio::Serial<Interrupt, NoEvents, Sinks>,
    /// Whether the port has refused input since it last signalled [`Shared::input_ready`].
    has_refused: bool,
}

impl Serial {
    /// A port that appends the guest's output to each of `outputs`. It signals `interrupt` for each interrupt: the line
    /// must be edge-triggered.
    pub(crate) fn new(interrupt: EventFd, outputs: Vec<Arc<dyn OutputSink>>) -> io::Result<Self> {
        let counters = Counters::new("serial");
        let sinks = Sinks {
            sinks: outputs,
            counters: counters.clone(),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                port: Mutex::new(Port {
                    uart: vm_superio::Serial::new(Interrupt(interrupt), sinks),
                    has_refused: false,
                }),
                input_ready: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
                counters,
            }),
        })
    }

    /// The bytes in both directions, and interrupts that could not be delivered.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        self.shared.counters.clone()
    }

    /// Puts input into the receive buffer of 64 bytes. Returns the number of bytes that fit. If some did not fit,
    /// [`Self::input_ready`] becomes readable when the guest has emptied the buffer: send the rest then.
    pub(crate) fn send_input(&self, bytes: &[u8]) -> usize {
        // Clears readiness. Usually there is nothing to read.
        let _ = self.shared.input_ready.read();
        let mut port = self.shared.port.lock();
        let (taken, result) = port.enqueue(bytes);
        port.has_refused = taken < bytes.len();
        drop(port);
        self.shared.counters.add_bytes_to_guest(taken as u64);
        if let Err(error) = result {
            self.shared.counters.add_error();
            log::warn!(target: "serial", "the guest may not notice input: cannot interrupt it: {error}");
        }
        taken
    }

    /// A descriptor that is readable if input that was refused can be sent again. [`Self::send_input`] clears it.
    pub(crate) fn input_ready(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.shared.input_ready.as_raw_fd()) }
    }

    /// Calls `access` for the register at `offset`, then signals if it made the port take input again.
    fn access(&self, offset: u64, access: impl FnOnce(u8, &mut Port)) {
        let Ok(offset) = u8::try_from(offset) else {
            return;
        };
        let mut port = self.shared.port.lock();
        access(offset, &mut port);
        if port.has_refused && port.is_drained() {
            port.has_refused = false;
            // Fails only if the counter is full, and then the descriptor is readable.
            let _ = self.shared.input_ready.write(1);
        }
    }
}

impl Port {
    /// Puts bytes into the receive buffer. Returns how many it took, and whether it could interrupt the guest.
    fn enqueue(&mut self, bytes: &[u8]) -> (usize, Result<(), UartError>) {
        let count = self.uart.fifo_capacity().min(bytes.len());
        if count == 0 || self.is_in_loopback() {
            return (0, Ok(()));
        }
        // The interrupt comes last, so if it fails, the buffer has the bytes.
        (count, self.uart.enqueue_raw_bytes(&bytes[..count]).map(drop))
    }

    /// Whether the guest has read all input, and the port takes more. Signalling for each free byte would wake the
    /// event loop for each byte of a paste.
    fn is_drained(&mut self) -> bool {
        self.uart.fifo_capacity() == FIFO_SIZE && !self.is_in_loopback()
    }

    /// In loopback mode the port receives what it transmits, and no input.
    fn is_in_loopback(&mut self) -> bool {
        self.uart.read(MODEM_CONTROL) & LOOPBACK != 0
    }
}

impl Registers for Serial {
    /// A string instruction reads the same register for each byte.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.access(offset, |offset, port| {
            for byte in data {
                *byte = port.uart.read(offset);
            }
        });
    }

    /// A string instruction writes the same register for each byte.
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.access(offset, |offset, port| {
            for byte in data {
                if let Err(error) = port.uart.write(offset, *byte) {
                    self.shared.counters.add_error();
                    log::warn!(target: "serial", "the guest's console may hang: cannot interrupt the guest: {error}");
                }
            }
        });
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Serial").finish_non_exhaustive()
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Sinks {
    sinks: Vec<Arc<dyn OutputSink>>,
    counters: Arc<Counters>,
}

impl io::Write for Sinks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.counters.add_bytes_from_guest(bytes.len() as u64);
        for sink in &self.sinks {
            sink.append(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::devices::console_tail::ConsoleTail;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const LINE_CONTROL: u64 = 3;
    const LINE_STATUS: u64 = 5;
    const SCRATCH: u64 = 7;

    const DATA_READY: u8 = 1;
    const RECEIVED_DATA: u8 = 1;
    const TRANSMITTER_EMPTY: u8 = 2;

    struct Guest {
        registers: Serial,
        interrupt: EventFd,
    }

    impl Guest {
        fn read(&mut self, offset: u64) -> u8 {
            let mut data = [0];
            self.registers.read(offset, &mut data);
            data[0]
        }

        fn write(&mut self, offset: u64, value: u8) {
            self.registers.write(offset, &[value]);
        }

        fn take_interrupt(&self) -> bool {
            self.interrupt.read().is_ok()
        }

        /// What Linux's driver does on an interrupt.
        fn read_input(&mut self) -> Vec<u8> {
            self.read(INTERRUPT_IDENTIFICATION);
            let mut input = Vec::new();
            while self.read(LINE_STATUS) & DATA_READY != 0 {
                input.push(self.read(DATA));
            }
            input
        }
    }

    fn serial(outputs: Vec<Arc<dyn OutputSink>>) -> (Serial, Guest) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let serial = Serial::new(interrupt.try_clone().unwrap(), outputs).unwrap();
        let guest = Guest {
            registers: serial.clone(),
            interrupt,
        };
        (serial, guest)
    }

    fn is_input_ready(serial: &Serial) -> bool {
        let mut descriptors = [PollFd::from_borrowed_fd(serial.input_ready(), PollFlags::IN)];
        poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn output_reaches_all_sinks_and_interrupts_a_guest_that_waits_for_the_transmitter() {
        let tails = [Arc::new(ConsoleTail::default()), Arc::new(ConsoleTail::default())];
        let (_, mut guest) = serial(vec![tails[0].clone(), tails[1].clone()]);

        guest.registers.write(DATA, b"login");
        assert!(!guest.take_interrupt());
        guest.write(INTERRUPT_ENABLE, TRANSMITTER_EMPTY);
        assert!(guest.take_interrupt());
        guest.read(INTERRUPT_IDENTIFICATION);
        guest.write(DATA, b':');
        assert!(guest.take_interrupt());

        for tail in tails {
            assert_eq!(tail.to_vec(), b"login:");
        }
        let counters = guest.registers.counters().read();
        assert_eq!(
            (counters.bytes_from_guest, counters.bytes_to_guest, counters.errors),
            (6, 0, 0)
        );
    }

    #[test]
    fn input_interrupts_the_guest_and_is_read_in_order() {
        let (serial, mut guest) = serial(vec![]);
        assert_eq!(serial.send_input(b"early "), 6);
        assert!(!guest.take_interrupt(), "the guest has not enabled interrupts");

        guest.write(INTERRUPT_ENABLE, RECEIVED_DATA);
        assert!(guest.take_interrupt());
        assert_eq!(guest.read_input(), b"early ");
        assert_eq!(serial.send_input(b"root\n"), 5);

        assert!(guest.take_interrupt());
        assert_eq!(guest.read_input(), b"root\n");
        assert!(!is_input_ready(&serial), "nothing was refused");
    }

    #[test]
    fn input_beyond_the_buffer_is_refused_until_the_guest_has_read_cve_2020_27174() {
        let (serial, mut guest) = serial(vec![]);
        guest.write(INTERRUPT_ENABLE, RECEIVED_DATA);
        let paste: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let mut rest = &paste[..];
        let mut received = Vec::new();

        rest = &rest[serial.send_input(rest)..];
        assert_eq!(paste.len() - rest.len(), 64);
        assert_eq!(serial.send_input(rest), 0);
        while !rest.is_empty() {
            assert!(!is_input_ready(&serial));
            assert!(guest.take_interrupt());
            received.extend(guest.read_input());
            assert!(is_input_ready(&serial));
            rest = &rest[serial.send_input(rest)..];
        }
        received.extend(guest.read_input());

        assert_eq!(received, paste);
        assert_eq!(serial.counters().read().bytes_to_guest, 1000);
        assert!(!is_input_ready(&serial));
    }

    #[test]
    fn input_is_refused_in_loopback_mode_and_ready_after_it() {
        let (serial, mut guest) = serial(vec![]);
        guest.write(MODEM_CONTROL.into(), LOOPBACK);

        assert_eq!(serial.send_input(b"x"), 0);
        guest.write(DATA, b'y');
        assert_eq!(guest.read(DATA), b'y');
        assert!(!is_input_ready(&serial));
        guest.write(MODEM_CONTROL.into(), 0);

        assert!(is_input_ready(&serial));
        assert_eq!(serial.send_input(b"x"), 1);
        assert_eq!(guest.read_input(), b"x");
    }

    #[test]
    fn any_access_leaves_the_port_usable() {
        let (serial, mut guest) = serial(vec![]);
        for offset in (0..10).chain([255, 256, u64::MAX]) {
            guest.registers.write(offset, &[0xff; 4096]);
            let mut data = [0; 4096];
            guest.registers.read(offset, &mut data);
        }
        guest.write(MODEM_CONTROL.into(), 0);
        guest.write(LINE_CONTROL, 0);
        guest.write(SCRATCH, 0x5a);
        assert_eq!(guest.read(SCRATCH), 0x5a);
        assert_eq!(serial.send_input(&[]), 0);
        assert!(!is_input_ready(&serial));
    }
}
