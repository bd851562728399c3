//! The entry point of the fuzz target for messages of the agent.
//!
//! Belongs here: functions that pass the bytes of an input to this crate and panic if it breaks its contract. Does not
//! belong here: anything that shim or agent need. The targets in `fuzz/fuzz_targets` call these functions, and so do
//! the tests, with the stored inputs.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::fmt::Debug;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    FrameBuffer, FromAgent, MAX_FROM_AGENT, MAX_NAME_FRAME, MAX_SHELL_FRAME, MAX_TO_AGENT, NameAnswer, NameQuery,
    ShellInput, ShellOutput, ToAgent, encode,
};

/// Receives `data`, whose first byte selects the kind of message, as the frames of a stream, at once and in parts.
///
/// # Panics
///
/// If the messages depend on the parts, or a message differs after it is encoded and decoded.
pub fn receive_messages(data: &[u8]) {
    let Some((selection, stream)) = data.split_first() else {
        return;
    };
    match selection % 8 {
        0 => compare::<NameQuery>(stream, MAX_NAME_FRAME),
        1 => compare::<NameAnswer>(stream, MAX_NAME_FRAME),
        2 => compare::<ShellInput>(stream, MAX_SHELL_FRAME),
        3 => compare::<ShellOutput>(stream, MAX_SHELL_FRAME),
        4 => compare::<ToAgent>(stream, MAX_TO_AGENT),
        _ => compare::<FromAgent>(stream, MAX_FROM_AGENT),
    }
}

fn compare<T: Debug + Serialize + DeserializeOwned>(stream: &[u8], max: usize) {
    let at_once = receive::<T>([stream].into_iter(), max);
    let in_parts = receive::<T>(stream.chunks(7), max);
    assert_eq!(at_once, in_parts);
}

/// The messages, encoded again. The last one is empty if the stream has an invalid frame.
fn receive<'s, T: Serialize + DeserializeOwned>(parts: impl Iterator<Item = &'s [u8]>, max: usize) -> Vec<Vec<u8>> {
    let mut frames = FrameBuffer::new(max);
    let mut messages = Vec::new();
    for part in parts {
        frames.push(part);
        loop {
            match frames.next::<T>() {
                Ok(Some(message)) => messages.push(encode_again(&message)),
                Ok(None) => break,
                Err(_) => {
                    messages.push(Vec::new());
                    return messages;
                }
            }
        }
    }
    messages
}

fn encode_again<T: Serialize + DeserializeOwned>(message: &T) -> Vec<u8> {
    let frame = encode(message, usize::MAX).unwrap();
    let mut frames = FrameBuffer::new(usize::MAX);
    frames.push(&frame);
    let decoded = frames.next::<T>().unwrap().unwrap();
    assert_eq!(encode(&decoded, usize::MAX).unwrap(), frame);
    frame
}

#[cfg(test)]
mod tests {
    use nutshell_fixtures::replay_corpus;

    #[test]
    fn stored_messages_do_not_depend_on_the_parts_of_their_stream() {
        replay_corpus("agent_messages", super::receive_messages);
    }
}
