//! The early console: as much of a 16550 as the kernel's `earlyprintk=serial` needs. It carries
//! what the guest says before its virtio console is up, which is where a boot that fails says why.

use std::{io, sync::Arc};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use super::virtio::console::Log;

/// The UART's first I/O port (COM1).
pub(crate) const BASE: u16 = 0x3f8;

/// How many ports it has.
pub(crate) const PORTS: u16 = 8;

/// A UART that only transmits, without an interrupt: early consoles poll.
pub(crate) struct Uart {
    serial: Serial<NoInterrupt, NoEvents, LogWriter>,
}

impl Uart {
    /// A UART that writes to `log`.
    pub(crate) fn new(log: Arc<Log>) -> Self {
        Self {
            serial: Serial::new(NoInterrupt, LogWriter(log)),
        }
    }

    /// The register at `offset` from [`BASE`].
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    /// Writes the register at `offset` from [`BASE`].
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // It can only fail where the log or the interrupt does, and neither can.
        let _ = self.serial.write(offset, value);
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

struct LogWriter(Arc<Log>);

impl io::Write for LogWriter {
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
    fn transmitted_bytes_reach_the_log_and_the_line_is_always_ready() {
        let log = Arc::new(Log::default());
        let mut uart = Uart::new(log.clone());
        for byte in b"panic" {
            assert_ne!(uart.read(5) & 0x20, 0, "transmitter is ready");
            uart.write(0, *byte);
        }
        assert_eq!(log.tail(), b"panic");
    }
}
