//! The control queues of a device with one port besides the console: what its driver reports, and the messages that the
//! driver has still to receive (virtio 1.3 §5.3.6.2).

/// The number of the port. Port 0 is the console of a driver without VIRTIO_CONSOLE_F_MULTIPORT, and is not announced
/// to others.
pub(super) const PORT: u32 = 1;

/// The size of `struct virtio_console_control`: port, event and value.
pub(super) const MESSAGE_SIZE: usize = 8;

/// Events (virtio 1.3 §5.3.6.2).
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver and the device know of the port. A message waits at most once, however often a driver asks for it.
#[derive(Debug, Default)]
pub(super) struct PortState {
    /// Whether a program in the guest has the port open.
    pub(super) guest_open: bool,
    /// The driver has the port.
    ready: bool,
    must_add: bool,
    must_name: bool,
    must_report_host: bool,
}

/// A message to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    Add,
    Name,
    /// Whether the host's end is open.
    HostOpen,
}

impl PortState {
    /// Handles a message of the driver. Messages about other ports and unknown events have no effect.
    pub(super) fn receive(&mut self, message: [u8; MESSAGE_SIZE]) {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let value = u16::from_le_bytes([v0, v1]);
        match (u16::from_le_bytes([e0, e1]), value) {
            (DEVICE_READY, 1) => self.must_add = true,
            (PORT_READY, 1) if port == PORT => {
                self.ready = true;
                self.must_name = true;
                self.must_report_host = true;
            }
            (PORT_OPEN, value) if port == PORT => self.guest_open = value == 1,
            _ => {}
        }
    }

    /// The host's end was closed, which the driver must learn if it has the port.
    pub(super) fn host_closed(&mut self) {
        self.must_report_host = self.ready;
    }

    /// The next message for the driver.
    pub(super) fn next(&self) -> Option<Message> {
        match self {
            Self { must_add: true, .. } => Some(Message::Add),
            Self { must_name: true, .. } => Some(Message::Name),
            Self {
                must_report_host: true, ..
            } => Some(Message::HostOpen),
            _ => None,
        }
    }

    /// The driver has received `message`.
    pub(super) fn mark_sent(&mut self, message: Message) {
        match message {
            Message::Add => self.must_add = false,
            Message::Name => self.must_name = false,
            Message::HostOpen => self.must_report_host = false,
        }
    }
}

impl Message {
    /// The bytes of the message.
    pub(super) fn encode(self, name: &str, host_open: bool) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (DEVICE_ADD, 1),
            Self::Name => (PORT_NAME, 1),
            Self::HostOpen => (PORT_OPEN, u16::from(host_open)),
        };
        let mut bytes = encode_control(PORT, event, value).to_vec();
        if self == Self::Name {
            // Without a terminating NUL (virtio 1.3 §5.3.6.2).
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }
}

fn encode_control(port: u32, event: u16, value: u16) -> [u8; MESSAGE_SIZE] {
    let message = u64::from(port) | u64::from(event) << 32 | u64::from(value) << 48;
    message.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(state: &mut PortState) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = state.next() {
            messages.push(message);
            state.mark_sent(message);
        }
        messages
    }

    #[test]
    fn driver_gets_each_message_once_however_often_it_asks() {
        let mut state = PortState::default();
        state.host_closed();
        assert_eq!(messages(&mut state), []);
        for _ in 0..1000 {
            state.receive(encode_control(0, DEVICE_READY, 1));
        }
        assert_eq!(messages(&mut state), [Message::Add]);
        for _ in 0..1000 {
            state.receive(encode_control(PORT, PORT_READY, 1));
        }
        assert_eq!(messages(&mut state), [Message::Name, Message::HostOpen]);
        state.host_closed();
        assert_eq!(messages(&mut state), [Message::HostOpen]);
    }

    #[test]
    fn only_open_and_close_of_the_port_change_whether_it_is_open() {
        let mut state = PortState::default();
        for (port, event, value, open) in [
            (0, PORT_OPEN, 1, false),
            (2, PORT_OPEN, 1, false),
            (PORT, PORT_OPEN, 2, false),
            (PORT, PORT_OPEN, 1, true),
            (PORT, 99, 0, true),
            (7, PORT_OPEN, 0, true),
            (0, DEVICE_READY, 0, true),
            (PORT, PORT_READY, 0, true),
            (PORT, PORT_OPEN, 0, false),
        ] {
            state.receive(encode_control(port, event, value));
            assert_eq!(state.guest_open, open, "{port} {event} {value}");
            assert_eq!(messages(&mut state), [], "{port} {event} {value}");
        }
    }

    #[test]
    fn messages_have_port_event_value_and_name() {
        for (message, open, expected) in [
            (Message::Add, true, &b"\x01\0\0\0\x01\0\x01\0"[..]),
            (Message::Name, true, b"\x01\0\0\0\x07\0\x01\0a.b"),
            (Message::HostOpen, true, b"\x01\0\0\0\x06\0\x01\0"),
            (Message::HostOpen, false, b"\x01\0\0\0\x06\0\0\0"),
        ] {
            assert_eq!(message.encode("a.b", open), expected, "{message:?}");
        }
    }
}
