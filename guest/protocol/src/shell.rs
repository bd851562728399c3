//! The messages of an administrator's shell in the guest, between the client on the host and the agent's process that
//! runs the shell. Each shell has a vsock connection, whose bytes the shim and the vmm pass on unchanged.

use serde::{Deserialize, Serialize};

/// The largest body of a frame in either direction, in bytes.
pub const MAX_SHELL_FRAME: usize = MAX_SHELL_DATA + 16;

/// The largest number of bytes of input or output in a message.
pub const MAX_SHELL_DATA: usize = 16 << 10;

/// A message from the client to the shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShellInput {
    /// Input of the shell, at most [`MAX_SHELL_DATA`] bytes.
    Data(Vec<u8>),
    /// Input has ended. No effect on a shell with a terminal.
    End,
    /// The size of the client's terminal has changed. No effect on a shell without a terminal.
    Resize(TerminalSize),
}

/// A message from the shell to the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShellOutput {
    /// Output of the shell and its programs, at most [`MAX_SHELL_DATA`] bytes.
    Data(Vec<u8>),
    /// The last message: the shell has ended with this exit status, or 128 plus the number of the signal that killed
    /// it.
    Exited(u8),
}

/// Columns and rows, as in struct winsize (TIOCSWINSZ).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// The width in characters.
    pub columns: u16,
    /// The height in characters.
    pub rows: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode;

    #[test]
    fn largest_data_fits_into_a_frame() {
        let input = ShellInput::Data(vec![0; MAX_SHELL_DATA]);
        assert!(encode(&input, MAX_SHELL_FRAME).is_ok());
        let output = ShellOutput::Data(vec![0; MAX_SHELL_DATA]);
        assert!(encode(&output, MAX_SHELL_FRAME).is_ok());
    }
}
