//! Streams of containers and pods: WebSockets to the address that Exec, Attach and PortForward answer, in
//! Kubernetes' protocol `v4.channel.k8s.io`: binary messages whose first byte is a channel.

use std::{
    io,
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::Value;
use tungstenite::{ClientRequestBuilder, Error, Message, WebSocket, client};

use crate::{
    PATIENCE,
    client::call,
    messages::{AttachRequest, ExecRequest, PortForwardRequest},
    pod::{Container, Pod, words},
};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// How a command ended, as JSON.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A connection of several channels.
#[derive(Debug)]
struct Channels {
    socket: WebSocket<TcpStream>,
}

impl Channels {
    fn open(url: &str) -> Self {
        let address = url.strip_prefix("http://").unwrap();
        let host = address.split('/').next().unwrap();
        let stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let request = ClientRequestBuilder::new(format!("ws://{address}").parse().unwrap())
            .with_sub_protocol("v4.channel.k8s.io");
        let (socket, _) = client(request, stream).unwrap_or_else(|error| panic!("{url}: {error}"));
        Self { socket }
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        if let Err(error) = self.socket.send(Message::Binary(message.into())) {
            // Why it is closed was said before.
            let last = std::iter::from_fn(|| self.receive()).last();
            panic!(
                "{error} after {:?}",
                last.map(|(_, text)| String::from_utf8_lossy(&text).into_owned())
            );
        }
    }

    /// The next channel's bytes that are any; nothing at the end of the connection.
    fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) if bytes.len() > 1 => return Some((bytes[0], bytes[1..].to_vec())),
                Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                    return None;
                }
                Ok(_) => (),
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("stream: {error}"),
            }
        }
    }
}

/// The streams of an executed command or of a container that was attached to.
#[derive(Debug)]
pub(crate) struct Terminal {
    channels: Channels,
    /// What came on standard output so far.
    pub(crate) stdout: String,
    /// What came on standard error so far.
    pub(crate) stderr: String,
    /// The exit status of the command, once it is known.
    pub(crate) exit: Option<i64>,
}

impl Terminal {
    /// Runs a command with all its streams, on a terminal if `tty`.
    pub(crate) fn exec(container: &Container, command: &[&str], tty: bool) -> Self {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: words(command),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Self::open(&call(&request).unwrap().url)
    }

    /// The streams of a container's own process.
    pub(crate) fn attach(container: &Container, tty: bool) -> Self {
        let request = AttachRequest {
            container_id: container.id.clone(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Self::open(&call(&request).unwrap().url)
    }

    fn open(url: &str) -> Self {
        Self {
            channels: Channels::open(url),
            stdout: String::new(),
            stderr: String::new(),
            exit: None,
        }
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) {
        self.channels.send(STDIN, text.as_bytes());
    }

    /// Changes the size of the terminal.
    pub(crate) fn resize(&mut self, columns: u16, rows: u16) {
        let size = format!(r#"{{"Width":{columns},"Height":{rows}}}"#);
        self.channels.send(RESIZE, size.as_bytes());
    }

    /// Reads until standard output has this text.
    pub(crate) fn wait_for(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            assert!(self.advance(), "ended before {text:?}: {self:?}");
        }
    }

    /// Reads to the end.
    pub(crate) fn wait(&mut self) {
        while self.advance() {}
    }

    fn advance(&mut self) -> bool {
        let Some((channel, bytes)) = self.channels.receive() else {
            return false;
        };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => self.stdout += &text,
            STDERR => self.stderr += &text,
            STATUS => self.exit = Some(exit_of(&text)),
            _ => panic!("channel {channel}: {text:?}"),
        }
        true
    }
}

/// The exit status in a status of Kubernetes' API.
fn exit_of(status: &str) -> i64 {
    let status: Value = serde_json::from_str(status).unwrap();
    if status["status"] == "Success" {
        return 0;
    }
    let causes = status["details"]["causes"].as_array().cloned().unwrap_or_default();
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    let code = code.unwrap_or_else(|| panic!("no exit status: {status}"));
    code["message"].as_str().unwrap().parse().unwrap()
}

/// A connection to a port of a pod.
#[derive(Debug)]
pub(crate) struct Forwarded {
    channels: Channels,
    unread: Vec<u8>,
}

/// Channels of a forwarded port.
const DATA: u8 = 0;
const FAILURE: u8 = 1;

impl Forwarded {
    /// Asks for a connection; whether there is one shows when it is used.
    pub(crate) fn open(pod: &Pod, port: u16) -> Self {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port.into()],
        };
        let url = call(&request).unwrap().url;
        let mut channels = Channels::open(&format!("{url}?port={port}"));
        // Each channel starts with the port that it is for.
        for channel in [DATA, FAILURE] {
            assert_eq!(channels.receive(), Some((channel, port.to_le_bytes().to_vec())));
        }
        Self {
            channels,
            unread: Vec::new(),
        }
    }

    /// Sends bytes to the port.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(32 * 1024) {
            self.channels.send(DATA, part);
        }
    }

    /// Receives exactly `length` bytes.
    pub(crate) fn receive(&mut self, length: usize) -> Vec<u8> {
        while self.unread.len() < length {
            match self.channels.receive() {
                Some((DATA, bytes)) => self.unread.extend(bytes),
                Some((_, text)) => panic!("{}", String::from_utf8_lossy(&text)),
                None => panic!("ended after {} bytes of {length}", self.unread.len()),
            }
        }
        self.unread.drain(..length).collect()
    }

    /// Why there is no connection, and after what time that was said.
    pub(crate) fn failure(mut self) -> (String, Duration) {
        let start = Instant::now();
        match self.channels.receive() {
            Some((FAILURE, text)) => (String::from_utf8_lossy(&text).into_owned(), start.elapsed()),
            other => panic!("no failure, but {other:?}"),
        }
    }
}
