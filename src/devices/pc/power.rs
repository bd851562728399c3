//! The register by which the guest resets or switches off the machine: reset register, sleep control register and sleep
//! status register of hardware-reduced ACPI (ACPI 6.5 §4.8.3.6 and §4.8.3.7) in one.

use std::fmt;

use crate::devices::bus::Registers;

/// The sleep type (`SLP_TYPx`) of state S5, power off.
pub(crate) const POWER_OFF_SLEEP_TYPE: u8 = 5;
/// The value that resets the machine.
pub(crate) const RESET: u8 = 1;

/// The position of the sleep type in the sleep control register (ACPI 6.5 §4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The bits of the sleep control register that are neither reserved nor ignored.
const SLEEP_MASK: u8 = 0b11_1100;

/// A request that the guest wrote to the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PowerRequest {
    Reset,
    PowerOff,
}

/// The register. It reads as 0: the machine has not been woken from sleep.
pub(crate) struct Power {
    handler: Box<dyn FnMut(PowerRequest) + Send>,
}

impl Power {
    /// A register that passes requests to `handler`, on the vCPU's thread. The guest may repeat a request.
    pub(crate) fn new(handler: impl FnMut(PowerRequest) + Send + 'static) -> Self {
        Self {
            handler: Box::new(handler),
        }
    }
}

impl Registers for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(request)) = (offset, data.first().copied().and_then(parse)) {
            (self.handler)(request);
        }
    }
}

/// `None` for a value without effect, such as the one that clears the wake status.
fn parse(value: u8) -> Option<PowerRequest> {
    if value == RESET {
        Some(PowerRequest::Reset)
    } else if value & SLEEP_MASK == POWER_OFF_SLEEP_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE {
        Some(PowerRequest::PowerOff)
    } else {
        None
    }
}

impl fmt::Debug for Power {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Power").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_reset_and_sleep_type_5_are_requests() {
        for value in 0..=u8::MAX {
            let expected = match value {
                1 => Some(PowerRequest::Reset),
                // Sleep type 5, enabled, with any value of the reserved bits and the ignored one.
                0x34..=0x37 | 0x74..=0x77 | 0xb4..=0xb7 | 0xf4..=0xf7 => Some(PowerRequest::PowerOff),
                _ => None,
            };
            assert_eq!(parse(value), expected, "{value:#x}");
        }
    }

    #[test]
    fn written_request_reaches_the_handler() {
        let (sender, requests) = mpsc::channel();
        let mut power = Power::new(move |request| sender.send(request).unwrap());

        power.write(0, &[]);
        power.write(1, &[RESET]);
        power.write(0, &[0x80]);
        power.write(0, &[0x34]);
        power.write(0, &[RESET]);

        let requests: Vec<_> = requests.try_iter().collect();
        assert_eq!(requests, [PowerRequest::PowerOff, PowerRequest::Reset]);
        let mut data = [0xff; 4];
        power.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
