//! The entry point of the fuzz target for the answer of the disk reader's guest.

use nutshell_protocol::{FrameBuffer, FromAgent, MAX_COMMAND_LINE, MAX_FROM_AGENT, Response};

use super::kernel::{MAX_SOURCE, check_command_line};
use crate::shim::machine::printable_line;

/// The maximum length of an escaped character in bytes, such as `\u{9f}`.
const ESCAPED: usize = 6;

/// Receives the frames in `data`, and checks the texts of each answer.
///
/// # Panics
///
/// If a text is accepted that is long or has control characters.
pub fn receive_disk_kernel(data: &[u8]) {
    let mut frames = FrameBuffer::new(MAX_FROM_AGENT);
    frames.push(data);
    while let Ok(Some(message)) = frames.next() {
        let FromAgent::Reply(reply) = message else { continue };
        let Ok(Response::DiskKernel(found)) = reply.result else {
            continue;
        };
        let source = printable_line(&found.source, MAX_SOURCE);
        assert!(source.len() <= MAX_SOURCE * ESCAPED + 3);
        assert!(!source.chars().any(char::is_control));
        if let Ok(line) = check_command_line(found.command_line) {
            assert!(line.len() <= MAX_COMMAND_LINE);
            assert!(!line.chars().any(char::is_control));
        }
    }
}
