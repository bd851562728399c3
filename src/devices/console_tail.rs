//! The tail of the guest's console output.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::control::MAX_CONSOLE_TAIL;

/// The last [`MAX_CONSOLE_TAIL`] bytes that the guest printed, on all of its consoles together. Kept for error
/// messages.
#[derive(Debug, Default)]
pub(crate) struct ConsoleTail(Mutex<VecDeque<u8>>);

impl ConsoleTail {
    /// Appends output of the guest and drops the oldest bytes beyond the limit.
    pub(crate) fn append(&self, bytes: &[u8]) {
        let mut tail = self.0.lock();
        let kept = &bytes[bytes.len().saturating_sub(MAX_CONSOLE_TAIL)..];
        let surplus = (tail.len() + kept.len()).saturating_sub(MAX_CONSOLE_TAIL);
        tail.drain(..surplus);
        tail.extend(kept);
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.0.lock().iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_beyond_the_limit_are_dropped_from_the_front() {
        let tail = ConsoleTail::default();

        tail.append(&vec![b'a'; MAX_CONSOLE_TAIL]);
        tail.append(b"the end");
        tail.append(&vec![b'b'; 3 * MAX_CONSOLE_TAIL]);
        tail.append(b"last words");

        let bytes = tail.to_vec();
        assert_eq!(bytes.len(), MAX_CONSOLE_TAIL);
        assert!(bytes.ends_with(b"blast words"));
    }
}
