//! The entry point of the fuzz target for control messages.

use super::control::{MESSAGE_SIZE, PortState};

/// The maximum number of messages that wait for the driver.
const MAX_WAITING: usize = 3;

/// Passes `data` to a port as control messages of its driver. A message whose last byte is 255 stands for the end of
/// the host's socket, or for a driver that receives.
///
/// # Panics
///
/// If more messages wait for the driver than there are kinds.
pub fn control_port(data: &[u8]) {
    let mut state = PortState::default();
    let (messages, _) = data.as_chunks::<MESSAGE_SIZE>();
    for message in messages {
        match message {
            [0, .., 255] => state.host_closed(),
            [_, .., 255] => receive_all(&mut state),
            message => state.receive(*message),
        }
    }
    receive_all(&mut state);
}

fn receive_all(state: &mut PortState) {
    let mut count = 0;
    while let Some(message) = state.next() {
        let bytes = message.encode("org.qemu.guest_agent.0", true);
        assert!((MESSAGE_SIZE..64).contains(&bytes.len()));
        state.mark_sent(message);
        count += 1;
    }
    assert!(count <= MAX_WAITING, "{count}");
}
