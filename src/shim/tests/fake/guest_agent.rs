//! The QEMU guest agent of a fake machine with a user's kernel.

use std::{
    io::{BufRead, BufReader, Write},
    thread,
};

use serde_json::{Value, json};

use super::Fake;

impl Fake {
    /// Whether the newest machine has a port for a guest agent.
    pub(in crate::shim::tests) fn has_guest_agent_port(&self) -> bool {
        self.state().guest_agent.is_some()
    }

    /// Opens the port in the guest. No agent answers.
    pub(in crate::shim::tests) fn open_guest_agent_port(&self) {
        self.state().is_guest_agent_open = true;
    }

    /// Starts an agent in the guest, which answers each command with what `answer` returns for its name and arguments.
    pub(in crate::shim::tests) fn start_guest_agent(
        &self,
        mut answer: impl FnMut(&str, &Value) -> Option<Value> + Send + 'static,
    ) {
        let mut socket = self.wait_until(|state| state.guest_agent.as_ref().map(|socket| socket.try_clone().unwrap()));
        socket.set_nonblocking(false).unwrap();
        self.open_guest_agent_port();
        let reader = BufReader::new(socket.try_clone().unwrap());
        thread::spawn(move || {
            for line in reader.split(b'\n').map_while(Result::ok) {
                let text = line.strip_prefix(b"\xff").unwrap_or(&line);
                let command: Value = serde_json::from_slice(text).unwrap();
                let (name, arguments) = (command["execute"].as_str().unwrap(), &command["arguments"]);
                let (delimiter, answer) = match name {
                    "guest-sync-delimited" => ("\u{ff}", Some(json!({"return": arguments["id"]}))),
                    _ => ("", answer(name, arguments)),
                };
                let mut bytes: Vec<u8> = delimiter.chars().map(|_| 0xff).collect();
                bytes.extend(answer.map(|answer| format!("{answer}\n")).unwrap_or_default().bytes());
                if socket.write_all(&bytes).is_err() {
                    break;
                }
            }
        });
    }
}
