//! The generic event device of ACPI (ACPI 6.5 §5.6.9): a register of pending events, and an interrupt that makes the
//! guest read it.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::bus::Registers;

/// The event bit of a press of the power button.
pub(crate) const POWER_BUTTON: u8 = 1;

/// The device. Clones share the events.
#[derive(Debug, Clone)]
pub(crate) struct GenericEvents {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pending: AtomicU8,
    interrupt: EventFd,
}

impl GenericEvents {
    /// A device without pending events. It signals `interrupt` for each event: the line must be edge-triggered.
    pub(crate) fn new(interrupt: EventFd) -> Self {
        Self {
            shared: Arc::new(Shared {
                pending: AtomicU8::new(0),
                interrupt,
            }),
        }
    }

    /// Requests a shutdown of the guest, which may ignore or delay the request.
    pub(crate) fn press_power_button(&self) -> io::Result<()> {
        self.shared.pending.fetch_or(POWER_BUTTON, Ordering::SeqCst);
        self.shared.interrupt.write(1)
    }
}

impl Registers for GenericEvents {
    /// Reads the pending events, which are no longer pending afterwards.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.shared.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn pressed_power_button_interrupts_and_is_pending_until_it_is_read() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let events = GenericEvents::new(interrupt.try_clone().unwrap());
        let mut registers = events.clone();
        let mut read = |offset| {
            let mut data = [0xff; 4];
            registers.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0), 0);
        assert!(interrupt.read().is_err(), "no event, no interrupt");

        events.press_power_button().unwrap();

        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(1), 0, "the other bytes have no events and clear none");
        assert_eq!(read(0), 1);
        assert_eq!(read(0), 0);
    }

    #[test]
    fn each_press_interrupts() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut events = GenericEvents::new(interrupt.try_clone().unwrap());
        for _ in 0..2 {
            events.press_power_button().unwrap();
            assert_eq!(interrupt.read().unwrap(), 1);
            let mut data = [0; 4];
            events.read(0, &mut data);
            assert_eq!(data, [1, 0, 0, 0]);
        }
        events.write(0, &[1]);
        let mut data = [0xff; 4];
        events.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
