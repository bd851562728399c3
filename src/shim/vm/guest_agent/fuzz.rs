//! The entry point of the fuzz target for answers of guest agents.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream};

use super::{GuestAgent, Program, messages};

/// The maximum length of all answers, in bytes. The buffer of a socket holds that many without a reader.
const MAX_ANSWERS: usize = 64 << 10;

/// The maximum length of a text of the agent, in bytes: 512 characters, of which each may be escaped.
const MAX_TEXT: usize = 512 * 6;

/// Passes `data` to a client of the agent as all answers to its commands, and each line to the parsers of answers.
///
/// # Panics
///
/// If a status does not fit into a byte, or a text of the agent is long or has control characters.
pub fn receive_answers(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (mut agent, socket) = UnixStream::pair().unwrap();
        agent.write_all(&data[..data.len().min(MAX_ANSWERS)]).unwrap();
        // A client that waits for more gets an error at once.
        agent.shutdown(Shutdown::Write).unwrap();
        let client = GuestAgent::new(socket).unwrap();
        if let Ok(version) = client.version().await {
            assert_printable(&version);
        }
        let program = Program {
            path: "true".to_owned(),
            arguments: Vec::new(),
            environment: None,
            input: Vec::new(),
        };
        // Most inputs are wrong answers.
        let _ = client.start(&program).await;
    });
    for line in data.split(|byte| *byte == b'\n') {
        let _ = messages::parse::<messages::Started>("guest-exec", line);
        match messages::parse::<messages::ExecStatus>("guest-exec-status", line) {
            Ok(status) => {
                if let Ok(Some(finished)) = status.finished() {
                    assert!(finished.status <= 255);
                    assert!(finished.stdout.len() + finished.stderr.len() <= line.len());
                }
            }
            Err(error) => assert_printable(&error.to_string()),
        }
    }
}

fn assert_printable(text: &str) {
    assert!(text.len() <= MAX_TEXT + 200, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
