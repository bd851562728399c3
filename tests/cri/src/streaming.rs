//! Streams of containers and pods. Exec, Attach and PortForward return the URL of a WebSocket with Kubernetes' protocol
//! `v4.channel.k8s.io`: binary messages whose first byte is the channel.

use std::{
    io,
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::Value;
use tungstenite::{ClientRequestBuilder, Error, Message, WebSocket, client};

use crate::{
    client::call,
    messages::{AttachRequest, ExecRequest, PortForwardRequest},
    pod::{Container, Pod, to_strings},
    wait::TIMEOUT,
};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// The result of a command, as JSON.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A connection with several channels.
#[derive(Debug)]
struct Channels {
    socket: WebSocket<TcpStream>,
}

impl Channels {
    fn open(url: &str) -> Self {
        let address = url.strip_prefix("http://").unwrap();
        let host = address.split('/').next().unwrap();
        let stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let request = ClientRequestBuilder::new(format!("ws://{address}").parse().unwrap())
            .with_sub_protocol("v4.channel.k8s.io");
        let (socket, _) = client(request, stream).unwrap_or_else(|error| panic!("{url}: {error}"));
        Self { socket }
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        if let Err(error) = self.socket.send(Message::Binary(message.into())) {
            // The server sends the reason before it closes the connection.
            let last = std::iter::from_fn(|| self.receive()).last();
            panic!(
                "{error}; last message: {:?}",
                last.map(|(_, text)| String::from_utf8_lossy(&text).into_owned())
            );
        }
    }

    /// Returns the next message that is not empty: its channel and its bytes. `None` is the end of the connection.
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

/// The streams of an exec, or of a container that is attached to.
#[derive(Debug)]
pub(crate) struct Streams {
    channels: Channels,
    /// Standard output so far, with replacements for bytes that are not UTF-8.
    pub(crate) stdout: String,
    /// Standard output so far.
    pub(crate) bytes: Vec<u8>,
    /// Standard error so far.
    pub(crate) stderr: String,
    /// The exit status of the command, if it has ended.
    pub(crate) exit: Option<i64>,
}

impl Streams {
    /// Runs a command in the container, on a terminal if `tty`.
    pub(crate) fn exec(container: &Container, command: &[&str], tty: bool) -> Self {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: to_strings(command),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Self::open(&call(&request).unwrap().url)
    }

    /// Attaches to the container's process.
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
            bytes: Vec::new(),
            stderr: String::new(),
            exit: None,
        }
    }

    /// Writes to standard input.
    pub(crate) fn send(&mut self, text: &str) {
        self.send_bytes(text.as_bytes());
    }

    /// Writes bytes to standard input.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(32 * 1024) {
            self.channels.send(STDIN, part);
        }
    }

    /// Changes the size of the terminal.
    pub(crate) fn resize(&mut self, columns: u16, rows: u16) {
        let size = format!(r#"{{"Width":{columns},"Height":{rows}}}"#);
        self.channels.send(RESIZE, size.as_bytes());
    }

    /// Reads until standard output contains `text`.
    pub(crate) fn wait_for(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            assert!(self.receive_message(), "the stream ended before {text:?}: {self:?}");
        }
    }

    /// Reads until the connection ends.
    pub(crate) fn read_to_end(&mut self) {
        while self.receive_message() {}
    }

    /// Receives one message. Returns false at the end of the connection.
    fn receive_message(&mut self) -> bool {
        let Some((channel, bytes)) = self.channels.receive() else {
            return false;
        };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => {
                self.stdout += &text;
                self.bytes.extend(&bytes);
            }
            STDERR => self.stderr += &text,
            STATUS => self.exit = Some(parse_exit_status(&text)),
            _ => panic!("unexpected channel {channel}: {text:?}"),
        }
        true
    }
}

/// Returns the exit status from a `Status` object of Kubernetes' API.
fn parse_exit_status(status: &str) -> i64 {
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
pub(crate) struct ForwardedPort {
    channels: Channels,
    unread: Vec<u8>,
}

/// The channel for data of a forwarded port.
const DATA: u8 = 0;
/// The channel for errors of a forwarded port.
const FAILURE: u8 = 1;

impl ForwardedPort {
    /// Opens a connection. A failure to connect to the port is only reported when the connection is used.
    pub(crate) fn open(pod: &Pod, port: u16) -> Self {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port.into()],
        };
        let url = call(&request).unwrap().url;
        let mut channels = Channels::open(&format!("{url}?port={port}"));
        // The first message of each channel is the port.
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
                None => panic!("the connection ended after {} of {length} bytes", self.unread.len()),
            }
        }
        self.unread.drain(..length).collect()
    }

    /// Waits for the error that the port cannot be reached. Returns its text and the time until it arrived.
    pub(crate) fn wait_for_failure(mut self) -> (String, Duration) {
        let start = Instant::now();
        match self.channels.receive() {
            Some((FAILURE, text)) => (String::from_utf8_lossy(&text).into_owned(), start.elapsed()),
            other => panic!("{other:?} instead of an error"),
        }
    }
}
