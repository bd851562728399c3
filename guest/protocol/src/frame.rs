//! Framing: each message is a little-endian `u32` length, followed by that many bytes of postcard.

use serde::{Serialize, de::DeserializeOwned};

/// The largest body of a frame to the agent, in bytes. The largest message carries BusyBox, which has 2 MiB
/// ([`OpenShell`](crate::OpenShell)).
pub const MAX_TO_AGENT: usize = 4 << 20;

/// The largest body of a frame from the agent, in bytes: [`MAX_PROCESSES`](crate::MAX_PROCESSES) with long exec ids.
pub const MAX_FROM_AGENT: usize = 512 << 10;

const PREFIX_SIZE: usize = size_of::<u32>();

/// Why a frame could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The body is not a message of the expected type. Shim and agent may be of different versions.
    #[error("the frame does not contain a message of this protocol version: {0}")]
    Malformed(#[source] postcard::Error),
    /// The body is longer than messages in this direction may be.
    #[error("the frame's body of {length} bytes exceeds the limit of {max} bytes")]
    TooLong {
        /// The length of the body, in bytes.
        length: usize,
        /// The limit, in bytes.
        max: usize,
    },
}

/// Encodes `message` as one frame, including its length prefix. Its body may have `max` bytes: [`MAX_TO_AGENT`] or
/// [`MAX_FROM_AGENT`].
///
/// # Errors
///
/// [`FrameError::TooLong`] if the body would be longer; [`FrameError::Malformed`] if `message` cannot be serialized.
pub fn encode(message: &impl Serialize, max: usize) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(message, vec![0; PREFIX_SIZE]).map_err(FrameError::Malformed)?;
    let body = frame.len() - PREFIX_SIZE;
    let length = u32::try_from(body)
        .ok()
        .filter(|_| body <= max)
        .ok_or(FrameError::TooLong { length: body, max })?;
    frame[..PREFIX_SIZE].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Reassembles messages from the bytes of a stream.
///
/// If the caller takes all messages after each push, it holds at most one incomplete frame plus the last push.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
    max: usize,
}

impl FrameBuffer {
    /// An empty buffer for frames whose bodies have at most `max` bytes: [`MAX_TO_AGENT`] or [`MAX_FROM_AGENT`].
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            max,
        }
    }

    /// Appends bytes that were read from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Removes and returns the next complete message, or `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLong`] as soon as a length prefix exceeds the limit; [`FrameError::Malformed`] if the
    /// body is not a `T`. The stream is out of sync after an error, so the caller must close it.
    #[expect(clippy::should_implement_trait, reason = "each call chooses the type of its message")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let pending = &self.bytes[self.start..];
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX_SIZE>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > self.max {
            return Err(FrameError::TooLong { length, max: self.max });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body).map_err(FrameError::Malformed)?;
        self.start += PREFIX_SIZE + length;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_split_at_any_byte_is_reassembled() {
        let frame = encode(&("hello", 7_u32), 64).unwrap();
        for split in 0..frame.len() {
            let mut buffer = FrameBuffer::new(64);
            buffer.push(&frame[..split]);
            assert_eq!(buffer.next::<(String, u32)>().unwrap(), None);
            buffer.push(&frame[split..]);
            assert_eq!(buffer.next().unwrap(), Some(("hello".to_owned(), 7_u32)));
            assert_eq!(buffer.next::<(String, u32)>().unwrap(), None);
        }
    }

    #[test]
    fn two_messages_in_one_push_arrive_in_order() {
        let mut bytes = encode(&1_u32, 64).unwrap();
        bytes.extend(encode(&2_u32, 64).unwrap());
        let mut buffer = FrameBuffer::new(64);
        buffer.push(&bytes);
        assert_eq!(buffer.next().unwrap(), Some(1_u32));
        assert_eq!(buffer.next().unwrap(), Some(2_u32));
    }

    #[test]
    fn oversized_length_is_refused_before_its_body_arrives() {
        let mut buffer = FrameBuffer::new(64);
        buffer.push(&u32::MAX.to_le_bytes());
        assert!(matches!(buffer.next::<u32>(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn undecodable_body_is_an_error() {
        let mut buffer = FrameBuffer::new(64);
        buffer.push(&[3, 0, 0, 0, 0xff, 0xff, 0xff]);
        assert!(matches!(buffer.next::<String>(), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn message_over_the_limit_is_not_encoded() {
        assert!(matches!(encode(&vec![0_u8; 64], 64), Err(FrameError::TooLong { .. })));
    }
}
