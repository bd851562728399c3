//! Frames: a little-endian `u32` length, then that many bytes of postcard.

use serde::{Serialize, de::DeserializeOwned};

/// The largest body of a frame, in bytes. An OCI spec of a busy pod stays far below.
pub const MAX_FRAME: usize = 4 << 20;

const PREFIX: usize = size_of::<u32>();

/// What is wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The body is not a message of this version.
    #[error("the frame holds no message of this version: {0}")]
    Malformed(#[source] postcard::Error),
    /// The body is longer than [`MAX_FRAME`].
    #[error("the frame's body of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
}

/// Encodes `message` as one frame, prefix included.
///
/// # Errors
///
/// [`FrameError::TooLong`] if the body would exceed [`MAX_FRAME`].
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(message, vec![0; PREFIX]).map_err(FrameError::Malformed)?;
    let body = frame.len() - PREFIX;
    let length = u32::try_from(body)
        .ok()
        .filter(|_| body <= MAX_FRAME)
        .ok_or(FrameError::TooLong(body))?;
    frame[..PREFIX].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Collects bytes of a stream and yields whole messages.
///
/// Holds at most one incomplete frame plus what the caller pushed since the last [`Self::next`].
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl FrameBuffer {
    /// Appends bytes read from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes arrive.
    ///
    /// # Errors
    ///
    /// The stream is beyond repair after an error: the caller must end it.
    #[expect(
        clippy::should_implement_trait,
        reason = "the type of message is the caller's choice each time"
    )]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let pending = &self.bytes[self.start..];
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body).map_err(FrameError::Malformed)?;
        self.start += PREFIX + length;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_split_at_every_byte_arrives_whole() {
        let frame = encode(&("hello", 7_u32)).unwrap();
        for split in 0..frame.len() {
            let mut buffer = FrameBuffer::default();
            buffer.push(&frame[..split]);
            assert_eq!(buffer.next::<(String, u32)>().unwrap(), None);
            buffer.push(&frame[split..]);
            assert_eq!(buffer.next().unwrap(), Some(("hello".to_owned(), 7_u32)));
            assert_eq!(buffer.next::<(String, u32)>().unwrap(), None);
        }
    }

    #[test]
    fn two_messages_in_one_push_arrive_in_order() {
        let mut bytes = encode(&1_u32).unwrap();
        bytes.extend(encode(&2_u32).unwrap());
        let mut buffer = FrameBuffer::default();
        buffer.push(&bytes);
        assert_eq!(buffer.next().unwrap(), Some(1_u32));
        assert_eq!(buffer.next().unwrap(), Some(2_u32));
    }

    #[test]
    fn oversized_length_is_refused_before_its_body_is_buffered() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&u32::MAX.to_le_bytes());
        assert!(matches!(buffer.next::<u32>(), Err(FrameError::TooLong(_))));
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&[3, 0, 0, 0, 0xff, 0xff, 0xff]);
        assert!(matches!(buffer.next::<String>(), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn message_over_the_limit_is_not_encoded() {
        assert!(matches!(
            encode(&vec![0_u8; MAX_FRAME + 1]),
            Err(FrameError::TooLong(_))
        ));
    }
}
