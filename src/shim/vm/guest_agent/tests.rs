//! The client with agents that a script plays.

use std::{
    io::{BufRead, BufReader, Write},
    thread::{self, JoinHandle},
};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{connection::MAX_LINE, *};

/// An agent that answers each command with the bytes of `answer`, except for the delimiter of a synchronization, and
/// returns the commands that it received.
struct FakeAgent {
    client: GuestAgent,
    thread: JoinHandle<Vec<Value>>,
}

fn start(mut answer: impl FnMut(&Value) -> Vec<u8> + Send + 'static) -> FakeAgent {
    let (client, guest) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let mut commands = Vec::new();
        let mut writer = guest.try_clone().unwrap();
        for line in BufReader::new(guest).split(b'\n') {
            // The delimiter, which makes an agent drop a part of a command.
            let line = line.unwrap();
            let text = line.strip_prefix(b"\xff").unwrap_or(&line);
            let command: Value = serde_json::from_slice(text).unwrap();
            let bytes = answer(&command);
            commands.push(command);
            // The client may have closed the connection.
            if writer.write_all(&bytes).is_err() {
                break;
            }
        }
        commands
    });
    FakeAgent {
        client: GuestAgent::new(client).unwrap(),
        thread,
    }
}

impl FakeAgent {
    /// The commands that it received, without synchronizations.
    fn commands(self) -> Vec<Value> {
        drop(self.client);
        let mut commands = self.thread.join().unwrap();
        commands.retain(|command| command["execute"] != "guest-sync-delimited");
        commands
    }
}

fn line(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// The answer to a synchronization; `None` for another command.
fn synchronization(command: &Value) -> Option<Vec<u8>> {
    (command["execute"] == "guest-sync-delimited").then(|| {
        let mut bytes = vec![0xff];
        bytes.extend(line(&json!({"return": command["arguments"]["id"]})));
        bytes
    })
}

fn program() -> Program {
    Program {
        path: "/bin/true".to_owned(),
        arguments: Vec::new(),
        environment: None,
        input: Vec::new(),
    }
}

#[tokio::test]
async fn process_is_started_and_polled_until_it_has_ended() {
    let mut polls = 0;
    let agent = start(move |command| {
        synchronization(command).unwrap_or_else(|| {
            line(&match command["execute"].as_str().unwrap() {
                "guest-exec" => json!({"return": {"pid": 42}}),
                "guest-exec-status" => {
                    polls += 1;
                    match polls < 3 {
                        true => json!({"return": {"exited": false}}),
                        false => json!({"return": {"exited": true, "exitcode": 1, "out-data": "b3V0"}}),
                    }
                }
                _ => json!({"return": {"version": "9.2.0", "supported_commands": []}}),
            })
        })
    });

    let pid = agent.client.start(&program()).await.unwrap();
    let finished = agent.client.wait(pid).await.unwrap();
    let version = agent.client.version().await.unwrap();

    assert_eq!((pid, finished.status, &finished.stdout[..]), (42, 1, &b"out"[..]));
    assert_eq!(version, "9.2.0");
    let commands = agent.commands();
    assert_eq!(commands.len(), 5);
    assert_eq!(commands[3]["arguments"], json!({"pid": 42}));
}

#[tokio::test]
async fn bytes_before_the_synchronization_are_discarded() {
    for before in [
        &b"login: \r\n"[..],
        b"{\"return\": {\"pid\": 1}}\n",
        b"\xff{\"return\": 77}\n",
        b"\xff\xff\xff\n\xff\n",
        &[b'x'; 5 << 20],
    ] {
        let before = before.to_vec();
        let agent = start(move |command| {
            let mut bytes = before.clone();
            bytes.extend(synchronization(command).unwrap());
            bytes
        });
        agent.client.synchronize().await.unwrap();
    }
}

/// An agent that synchronizes, answers the first other command with `bytes`, and answers later ones correctly.
fn hostile(bytes: Vec<u8>) -> FakeAgent {
    let mut bytes = Some(bytes);
    start(move |command| {
        synchronization(command).unwrap_or_else(|| {
            let good = || line(&json!({"return": {"version": "1"}}));
            bytes.take().unwrap_or_else(good)
        })
    })
}

#[tokio::test]
async fn hostile_answers_are_errors_in_time_and_the_client_stays_usable() {
    let long_line = vec![b'['; MAX_LINE * 2];
    let mut long_text = b"{\"return\": {\"version\": \"".to_vec();
    long_text.extend(vec![b'a'; MAX_LINE]);
    let mut deep = b"{\"x\": ".to_vec();
    deep.extend(vec![b'['; 1 << 20]);
    deep.push(b'\n');
    for (name, bytes, expected) in [
        ("never an answer", Vec::new(), "does not answer guest-info within 500ms"),
        ("endless line", long_line, "an answer of more than 4 MiB"),
        ("endless text", long_text, "an answer of more than 4 MiB"),
        ("deep nesting", deep, "EOF while parsing a list"),
        ("no JSON", b"\x80\n".to_vec(), "cannot parse the answer"),
        (
            "wrong type",
            b"{\"return\": {\"version\": 7}}\n".to_vec(),
            "invalid type",
        ),
        (
            "half a line",
            b"{\"return\": {\"version\"".to_vec(),
            "does not answer guest-info",
        ),
        (
            "disabled",
            b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"disabled\"}}\n".to_vec(),
            "refuses guest-info: disabled",
        ),
    ] {
        let agent = hostile(bytes);
        let begun = Instant::now();

        let error = agent.client.version().await.unwrap_err().to_string();

        assert!(error.contains(expected), "{name}: {error}");
        assert!(begun.elapsed() < ANSWER_LIMIT * 40, "{name}: {:?}", begun.elapsed());
        assert_eq!(agent.client.version().await.unwrap(), "1", "{name}");
    }
}

#[tokio::test]
async fn agent_that_never_synchronizes_is_an_error_in_time() {
    let wrong_id = |command: &Value| {
        let mut bytes = vec![0xff];
        bytes.extend(line(
            &json!({"return": command["arguments"]["id"].as_u64().unwrap() + 1}),
        ));
        bytes
    };
    type Answer = Box<dyn FnMut(&Value) -> Vec<u8> + Send>;
    let answers: [(&str, Answer, &[&str]); 5] = [
        ("silence", Box::new(|_| Vec::new()), &["does not answer"]),
        ("wrong id", Box::new(wrong_id), &["does not answer"]),
        (
            "no delimiter",
            Box::new(|_| b"{\"return\": 1}\n".to_vec()),
            &["does not answer"],
        ),
        // A slow host may not read all of it in time.
        (
            "flood",
            Box::new(|_| vec![b'x'; 32 << 20]),
            &["sent 16 MiB, but no answer", "does not answer"],
        ),
        (
            "flood of delimiters",
            Box::new(|_| b"\xff\n".repeat(16 << 20)),
            &["sent 16 MiB, but no answer", "does not answer"],
        ),
    ];
    for (name, answer, expected) in answers {
        let agent = start(answer);
        let begun = Instant::now();

        let error = agent.client.synchronize().await.unwrap_err().to_string();

        assert!(expected.iter().any(|text| error.contains(text)), "{name}: {error}");
        assert!(begun.elapsed() < FIRST_SYNC_LIMIT * 40, "{name}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn agent_that_has_answered_before_has_more_time() {
    for has_answered in [false, true] {
        let mut is_slow = !has_answered;
        let agent = start(move |command| {
            if std::mem::replace(&mut is_slow, true) {
                thread::sleep(FIRST_SYNC_LIMIT * 2);
            }
            synchronization(command).unwrap()
        });
        if has_answered {
            agent.client.synchronize().await.unwrap();
        }
        assert_eq!(agent.client.synchronize().await.is_ok(), has_answered);
    }
}

#[tokio::test]
async fn port_that_is_closed_is_an_error() {
    let (client, guest) = UnixStream::pair().unwrap();
    let client = GuestAgent::new(client).unwrap();
    drop(guest);
    let error = client.synchronize().await.unwrap_err();
    assert!(
        matches!(error, GuestAgentError::Closed | GuestAgentError::Socket(_)),
        "{error}"
    );
}

#[tokio::test]
async fn cancelled_command_does_not_shift_the_answers_of_later_ones() {
    // The answer to the first command comes late, with that to the next synchronization.
    let mut late = None;
    let agent = start(move |command| match synchronization(command) {
        Some(answer) => late.take().into_iter().flatten().chain(answer).collect(),
        None if command["execute"] == "guest-info" => {
            late = Some(line(&json!({"return": {"version": "late"}})));
            Vec::new()
        }
        None => line(&json!({"return": {"pid": 7}})),
    });
    let cancelled = tokio::time::timeout(Duration::from_millis(50), agent.client.version()).await;
    assert!(cancelled.is_err());

    assert_eq!(agent.client.start(&program()).await.unwrap(), 7);
}
