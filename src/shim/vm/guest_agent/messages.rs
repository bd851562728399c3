//! The commands of the agent and its answers (qemu, `qga/qapi-schema.json`), as JSON.

use std::fmt::{self, Write};

use data_encoding::{BASE64, DecodeError};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error, Visitor},
};
use serde_json::{Value, json};

use super::error::GuestAgentError;
use crate::shim::machine::printable_line;

/// The maximum length of a text of the agent in an error or a report, in characters.
const MAX_TEXT: usize = 512;

/// The exit status of a process whose end the agent does not describe.
const UNKNOWN_STATUS: u32 = 255;

/// A process to start in the guest. The agent runs it as root in its own working directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    /// A path, or a name that the agent looks up in its search path.
    pub(crate) path: String,
    pub(crate) arguments: Vec<String>,
    /// The whole environment, as `NAME=value`. `None` for that of the agent.
    pub(crate) environment: Option<Vec<String>>,
    /// Its standard input.
    pub(crate) input: Vec<u8>,
}

/// How a process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finished {
    /// The exit status, or 128 plus the number of the signal.
    pub(crate) status: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// The agent has dropped output.
    pub(crate) is_truncated: bool,
}

#[derive(Debug)]
pub(super) enum Command<'a> {
    Info,
    Exec(&'a Program),
    ExecStatus { pid: u32 },
}

#[derive(Serialize)]
struct Message<'a> {
    execute: &'a str,
    #[serde(skip_serializing_if = "Value::is_null")]
    arguments: Value,
}

impl Command<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Info => "guest-info",
            Self::Exec(_) => "guest-exec",
            Self::ExecStatus { .. } => "guest-exec-status",
        }
    }

    pub(super) fn to_line(&self) -> Result<Vec<u8>, GuestAgentError> {
        let arguments = match self {
            Self::Info => Value::Null,
            Self::ExecStatus { pid } => json!({"pid": pid}),
            Self::Exec(program) => {
                let mut arguments = json!({
                    "path": program.path,
                    "arg": program.arguments,
                    "capture-output": true,
                });
                if let Some(environment) = &program.environment {
                    arguments["env"] = json!(environment);
                }
                // Without it, standard input is /dev/null.
                if !program.input.is_empty() {
                    arguments["input-data"] = json!(BASE64.encode(&program.input));
                }
                arguments
            }
        };
        encode(self.name(), arguments)
    }
}

fn encode(command: &'static str, arguments: Value) -> Result<Vec<u8>, GuestAgentError> {
    let message = Message {
        execute: command,
        arguments,
    };
    let mut line = serde_json::to_vec(&message).map_err(|error| malformed(command, &error))?;
    line.push(b'\n');
    Ok(line)
}

/// The line of `guest-sync-delimited`.
pub(super) fn synchronization(id: u32) -> Result<Vec<u8>, GuestAgentError> {
    encode("guest-sync-delimited", json!({"id": id}))
}

/// Whether a line is the answer to [`synchronization`].
pub(super) fn is_synchronization(line: &[u8], id: u32) -> bool {
    matches!(parse::<u32>("guest-sync-delimited", line), Ok(answer) if answer == id)
}

/// An answer: a value or an error.
#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return")]
    value: Option<T>,
    error: Option<AgentError>,
}

#[derive(Deserialize)]
struct AgentError {
    desc: String,
}

/// Parses the answer to `command`.
pub(super) fn parse<T: DeserializeOwned>(command: &'static str, line: &[u8]) -> Result<T, GuestAgentError> {
    let answer: Answer<T> = serde_json::from_slice(line).map_err(|error| malformed(command, &error))?;
    match answer {
        Answer { error: Some(error), .. } => Err(GuestAgentError::Refused {
            command,
            reason: printable_line(&error.desc, MAX_TEXT),
        }),
        Answer { value: Some(value), .. } => Ok(value),
        _ => Err(malformed(command, &"it has neither a value nor an error")),
    }
}

fn malformed(command: &'static str, reason: &dyn fmt::Display) -> GuestAgentError {
    let mut start = TextStart(String::new());
    // The error means that the reason is longer: it may repeat a long text of the agent.
    let _ = write!(start, "{reason}");
    GuestAgentError::Malformed {
        command,
        reason: printable_line(&start.0, MAX_TEXT),
    }
}

/// The start of a text. It keeps up to twice [`MAX_TEXT`] characters, so that [`printable_line`] marks a longer text as
/// clipped.
struct TextStart(String);

impl Write for TextStart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = (2 * MAX_TEXT).saturating_sub(self.0.chars().count());
        self.0.extend(text.chars().take(room));
        match room {
            0 => Err(fmt::Error),
            _ => Ok(()),
        }
    }
}

/// The answer to `guest-info`, without the list of commands.
#[derive(Deserialize)]
pub(super) struct Info {
    version: String,
}

impl Info {
    pub(super) fn version(&self) -> String {
        printable_line(&self.version, MAX_TEXT)
    }
}

/// The answer to `guest-exec`.
#[derive(Deserialize)]
pub(super) struct Started {
    pub(super) pid: u32,
}

/// The answer to `guest-exec-status`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ExecStatus {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    #[serde(default = "no_output", deserialize_with = "decode")]
    out_data: Result<Vec<u8>, DecodeError>,
    #[serde(default = "no_output", deserialize_with = "decode")]
    err_data: Result<Vec<u8>, DecodeError>,
    #[serde(default)]
    out_truncated: bool,
    #[serde(default)]
    err_truncated: bool,
}

fn no_output() -> Result<Vec<u8>, DecodeError> {
    Ok(Vec::new())
}

/// Decodes Base64 without a copy of the text, which can be long. The output matters only after the end of the process,
/// so [`ExecStatus::finished`] returns the error.
fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Result<Vec<u8>, DecodeError>, D::Error> {
    struct Text;

    impl Visitor<'_> for Text {
        type Value = Result<Vec<u8>, DecodeError>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a string")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(BASE64.decode(text.as_bytes()))
        }
    }

    deserializer.deserialize_str(Text)
}

impl ExecStatus {
    /// `None` while the process runs.
    pub(super) fn finished(self) -> Result<Option<Finished>, GuestAgentError> {
        if !self.exited {
            return Ok(None);
        }
        let check = |data: Result<Vec<u8>, DecodeError>| data.map_err(|error| malformed("guest-exec-status", &error));
        // The agent can send any number, and a status must fit into a byte.
        let low_bits = |value: i64, mask: u8| u32::from(value.to_le_bytes()[0] & mask);
        Ok(Some(Finished {
            status: match (self.exitcode, self.signal) {
                (_, Some(signal)) => 128 + low_bits(signal, 0x7f),
                (Some(status), None) => low_bits(status, 0xff),
                (None, None) => UNKNOWN_STATUS,
            },
            stdout: check(self.out_data)?,
            stderr: check(self.err_data)?,
            is_truncated: self.out_truncated || self.err_truncated,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_one_line_of_json() {
        let program = Program {
            path: "/bin/sh".to_owned(),
            arguments: vec!["-c".to_owned(), "echo \"a\nb\"".to_owned()],
            environment: Some(vec!["A=b".to_owned()]),
            input: b"in".to_vec(),
        };
        let plain = Program {
            path: "true".to_owned(),
            arguments: Vec::new(),
            environment: None,
            input: Vec::new(),
        };
        for (command, expected) in [
            (Command::Info, json!({"execute": "guest-info"})),
            (
                Command::ExecStatus { pid: 7 },
                json!({"execute": "guest-exec-status", "arguments": {"pid": 7}}),
            ),
            (
                Command::Exec(&program),
                json!({"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", "echo \"a\nb\""],
                    "env": ["A=b"], "input-data": "aW4=", "capture-output": true}}),
            ),
            (
                Command::Exec(&plain),
                json!({"execute": "guest-exec", "arguments": {"path": "true", "arg": [], "capture-output": true}}),
            ),
        ] {
            let mut line = command.to_line().unwrap();
            assert_eq!(line.pop(), Some(b'\n'));
            assert!(!line.contains(&b'\n'));
            assert_eq!(serde_json::from_slice::<Value>(&line).unwrap(), expected);
        }
    }

    #[test]
    fn status_of_a_process_is_its_exit_code_or_signal_with_its_output() {
        let finished = |status, stdout: &str, stderr: &str, is_truncated| {
            Some(Finished {
                status,
                stdout: stdout.into(),
                stderr: stderr.into(),
                is_truncated,
            })
        };
        for (answer, expected) in [
            (json!({"exited": false, "out-data": "!"}), None),
            (json!({"exited": true, "exitcode": 3}), finished(3, "", "", false)),
            (json!({"exited": true, "signal": 9}), finished(137, "", "", false)),
            (json!({"exited": true}), finished(255, "", "", false)),
            (json!({"exited": true, "exitcode": -1}), finished(255, "", "", false)),
            (
                json!({"exited": true, "signal": i64::MIN}),
                finished(128, "", "", false),
            ),
            (
                json!({"exited": true, "exitcode": 0, "out-data": "b3V0", "err-data": "ZXJy", "err-truncated": true,
                    "new-field": [1]}),
                finished(0, "out", "err", true),
            ),
        ] {
            let line = json!({"return": answer}).to_string();
            let status: ExecStatus = parse("guest-exec-status", line.as_bytes()).unwrap();
            assert_eq!(status.finished().unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn wrong_answers_are_errors_with_the_command_and_the_reason() {
        let deep = format!("{{\"x\": {}", "[".repeat(100_000));
        for (line, expected) in [
            (
                "",
                "cannot parse the answer of the QEMU guest agent to guest-exec-status: EOF",
            ),
            ("{}", "it has neither a value nor an error"),
            ("{\"return\": 7}", "invalid type: integer `7`"),
            ("{\"return\": {}}", "missing field `exited`"),
            (
                "{\"return\": {\"exited\": true, \"out-data\": \"*\"}}",
                "invalid length",
            ),
            ("{\"return\": {\"exited\": true, \"exitcode\": 1e99}}", "invalid type"),
            (&deep, "EOF while parsing a list"),
            (
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2J\"}}",
                "the QEMU guest agent refuses guest-exec-status: no\\u{1b}[2J",
            ),
        ] {
            let status = parse::<ExecStatus>("guest-exec-status", line.as_bytes()).and_then(ExecStatus::finished);
            let error = status.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.len() < 1000, "{error}");
        }
    }
}
