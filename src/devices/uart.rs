//! The early console: the part of a 16550 UART that the kernel's `earlyprintk=serial` needs. It carries the guest's
//! output before its virtio console is up, in particular the error of a failed boot.

use std::{io, sync::Arc};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use super::{bus::Registers, console_tail::ConsoleTail};

/// The UART's first I/O port (COM1).
pub(crate) const FIRST_PORT: u16 = 0x3f8;

pub(crate) const PORT_COUNT: u16 = 8;

/// A UART that only transmits. It has no interrupt, since the early console polls.
pub(crate) struct Uart {
    serial: Serial<NoInterrupt, NoEvents, TailWriter>,
}

impl Uart {
    /// A UART whose output is appended to `tail`.
    pub(crate) fn new(tail: Arc<ConsoleTail>) -> Self {
        Self {
            serial: Serial::new(NoInterrupt, TailWriter(tail)),
        }
    }
}

impl Registers for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // Registers have one byte.
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.serial.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        for value in data {
            // Fails only if the writer or the interrupt fails, and neither of them can.
            let _ = self.serial.write(offset, *value);
        }
    }
}

impl std::fmt::Debug for Uart {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Uart").finish_non_exhaustive()
    }
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct TailWriter(Arc<ConsoleTail>);

impl io::Write for TailWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transmitted_bytes_reach_the_tail_and_the_transmitter_is_always_ready() {
        const LINE_STATUS: u64 = 5;
        const TRANSMITTER_EMPTY: u8 = 0x20;
        let tail = Arc::new(ConsoleTail::default());
        let mut uart = Uart::new(tail.clone());

        for byte in b"panic" {
            let mut status = [0];
            uart.read(LINE_STATUS, &mut status);
            assert_ne!(status[0] & TRANSMITTER_EMPTY, 0);
            uart.write(0, &[*byte]);
        }

        assert_eq!(tail.to_vec(), b"panic");
    }
}
