//! The agents of a fake machine with a user's kernel: nutshell's, and the QEMU guest agent.

use std::{
    io::{BufRead, BufReader, Write},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    thread,
};

use nutshell_protocol::{AGENT_PORT, FromAgent, Ready};
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

    /// The guest's end of that port.
    pub(in crate::shim::tests) fn guest_agent_stream(&self) -> UnixStream {
        let stream = self.wait_until(|state| state.guest_agent.as_ref().map(|socket| socket.try_clone().unwrap()));
        stream.set_nonblocking(false).unwrap();
        stream
    }

    /// Starts an agent in the guest, which answers each command with what `answer` returns for its name and arguments.
    pub(in crate::shim::tests) fn start_guest_agent(
        &self,
        mut answer: impl FnMut(&str, &Value) -> Option<Value> + Send + 'static,
    ) {
        let mut socket = self.guest_agent_stream();
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

    /// Connects an agent of the guest in a machine with a user's kernel, and serves it.
    pub(in crate::shim::tests) fn connect_agent(self: &Arc<Self>) {
        let stream = self.wait_until(|state| {
            state.inputs.remove(&AGENT_PORT);
            state.outputs.remove(&AGENT_PORT)
        });
        let stream = UnixStream::from(OwnedFd::from(stream));
        stream.set_nonblocking(false).unwrap();
        self.state().agent = Some(stream.try_clone().unwrap());
        self.send(&FromAgent::Ready(Ready {
            version: "7".to_owned(),
            kernel: "0".to_owned(),
        }));
        let fake = self.clone();
        thread::spawn(move || fake.serve_agent(stream));
    }

    /// Whether the newest machine lets an agent of the guest connect.
    pub(in crate::shim::tests) fn has_agent_port(&self) -> bool {
        self.state().outputs.contains_key(&AGENT_PORT)
    }

    /// Writes bytes to the agent's stream.
    pub(in crate::shim::tests) fn write_to_agent_stream(&self, bytes: &[u8]) {
        self.state().agent.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Ends the agent's stream.
    pub(in crate::shim::tests) fn disconnect_agent(&self) {
        let agent = self.state().agent.take().unwrap();
        agent.shutdown(Shutdown::Both).unwrap();
    }
}
