//! The state machine of one stream between a guest's socket and descriptors of the host. It knows
//! of packets and descriptors, not of queues: the muxer moves its packets.
//!
//! ```text
//!            ┌─ guest sends ──▶ pending ──▶ output        ends: guest's SHUTDOWN(SEND), then drained
//! connection │
//!            └─ guest receives ◀────────── input          ends: end of file, or guest's SHUTDOWN(RECEIVE)
//! ```
//!
//! Each direction ends on its own. When the guest has ended both and all that it sent went out, it
//! gets a RESET, which is how a socket that was closed in order is released (virtio 1.3
//! §5.10.6.5), and the connection is over. A RESET before that could cost the guest what it has
//! not read yet.

use std::{
    collections::VecDeque,
    io,
    num::Wrapping,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::packet::{Operation, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use crate::devices::virtio::buffers::Buffers;

/// How many bytes of a guest we hold while the host's reader is slow: the credit that it gets.
pub(super) const RECEIVE_BUFFER: u32 = 256 << 10;

/// Tell the guest of freed room when this much was freed since it last heard.
const CREDIT_STEP: u32 = RECEIVE_BUFFER / 4;

/// The most payload of one packet to the guest, which Linux takes in one buffer.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;

/// The ports of a connection: the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// The guest's port.
    pub(super) guest: u32,
    /// The host's port.
    pub(super) host: u32,
}

/// The direction from the guest to the host.
#[derive(Debug)]
enum Output {
    /// The guest may send.
    Open(OwnedFd),
    /// The guest has sent its last byte; what is pending still goes out.
    Draining(OwnedFd),
    /// Over.
    Closed,
}

/// The direction from the host to the guest.
#[derive(Debug)]
enum Input {
    /// There may be more to read.
    Open {
        descriptor: OwnedFd,
        /// Edge-triggered readiness: set by the poller, cleared by EAGAIN.
        readable: bool,
    },
    /// End of file was read; the guest is to be told.
    Ending,
    /// Over.
    Closed,
}

/// What the muxer may learn from a packet or an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Go on.
    Alive,
    /// The connection is over: forget it, and tell the guest by RESET if it does not know.
    Over {
        /// The guest is to be sent a RESET.
        tell_guest: bool,
    },
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    input: Input,
    output: Output,
    /// Bytes of the guest that the host's reader has not taken yet; at most [`RECEIVE_BUFFER`].
    pending: VecDeque<u8>,
    /// Bytes written to the output in all.
    delivered: u64,
    /// Payload bytes taken from the guest in all.
    received: Wrapping<u32>,
    /// [`Self::taken`] as the guest last heard of it.
    announced: Wrapping<u32>,
    /// Payload bytes sent to the guest in all.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    response_due: bool,
    credit_due: bool,
    /// The guest will not receive any more.
    guest_deaf: bool,
    /// The guest will not send any more.
    guest_mute: bool,
    /// The guest's socket is gone, by RESET: nothing is sent to it any more.
    guest_gone: bool,
}

impl Connection {
    /// Accepts the guest's `request` for the stream of these descriptors, which are non-blocking.
    pub(super) fn accept(request: &Packet, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            key: Key {
                guest: request.source_port,
                host: request.destination_port,
            },
            input: input.map_or(Input::Closed, |descriptor| Input::Open {
                descriptor,
                readable: true,
            }),
            output: output.map_or(Output::Closed, Output::Open),
            pending: VecDeque::new(),
            delivered: 0,
            received: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: request.buffer,
            guest_forwarded: Wrapping(request.forwarded),
            response_due: true,
            credit_due: false,
            guest_deaf: false,
            guest_mute: false,
            guest_gone: false,
        }
    }

    /// The descriptor that is read from, to poll.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.input {
            Input::Open { descriptor, .. } => Some(descriptor.as_fd()),
            Input::Ending | Input::Closed => None,
        }
    }

    /// The descriptor that is written to, to poll.
    pub(super) fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.output {
            Output::Open(descriptor) | Output::Draining(descriptor) => Some(descriptor.as_fd()),
            Output::Closed => None,
        }
    }

    /// How many bytes were written to the output in all.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Takes a packet of the guest, whose payload is `payload`.
    pub(super) fn receive(&mut self, packet: &Packet, payload: &mut Buffers<'_>) -> Fate {
        self.guest_buffer = packet.buffer;
        self.guest_forwarded = Wrapping(packet.forwarded);
        match packet.operation {
            Some(Operation::Payload) => return self.take_payload(payload),
            Some(Operation::Shutdown) => {
                if packet.flags & SHUTDOWN_RECEIVE != 0 {
                    self.guest_deaf = true;
                    self.input = Input::Closed;
                }
                if packet.flags & SHUTDOWN_SEND != 0 {
                    self.guest_mute = true;
                    self.end_output();
                }
            }
            Some(Operation::Reset) => {
                self.guest_gone = true;
                self.input = Input::Closed;
                self.end_output();
            }
            Some(Operation::CreditRequest) => self.credit_due = true,
            Some(Operation::CreditUpdate) => {}
            // A connection is opened once, and by the guest.
            Some(Operation::Request | Operation::Response) | None => return Fate::Over { tell_guest: true },
        }
        self.fate()
    }

    /// The input may be readable.
    pub(super) fn input_ready(&mut self) {
        if let Input::Open { readable, .. } = &mut self.input {
            *readable = true;
        }
    }

    /// The output may be writable: writes what is pending.
    pub(super) fn output_ready(&mut self) -> Fate {
        while !self.pending.is_empty() {
            let Some(output) = self.output() else { break };
            let (front, _) = self.pending.as_slices();
            match rustix::io::write(output, front) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.delivered += count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return self.lose_output(),
            }
        }
        if self.pending.is_empty() {
            // Bursts must not keep their memory for the life of the stream.
            self.pending = VecDeque::new();
            if let Output::Draining(_) = self.output {
                self.close_output();
            }
        }
        self.fate()
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        if self.guest_gone {
            return false;
        }
        let readable = matches!(self.input, Input::Open { readable: true, .. }) && self.credit() > 0;
        self.response_due
            || readable
            || matches!(self.input, Input::Ending)
            || self.credit_due
            || self.unannounced() >= CREDIT_STEP
    }

    /// The next packet for the guest; its payload is read straight into `room`, which is not empty. `None`
    /// if it turns out that there is none: then all of the room is there for another connection's.
    pub(super) fn send(&mut self, room: &Buffers<'_>) -> Option<Packet> {
        if self.response_due {
            self.response_due = false;
            return Some(self.packet(Operation::Response, 0, 0));
        }
        let credit = self.credit() as usize;
        if let Input::Open { descriptor, readable } = &mut self.input
            && *readable
            && credit > 0
        {
            let space = room.front(credit.min(MAX_PAYLOAD));
            match space.read_from(descriptor.as_fd(), None) {
                Ok(0) => self.input = Input::Ending,
                Ok(count) => {
                    // At most MAX_PAYLOAD.
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    self.sent += Wrapping(count);
                    return Some(self.packet(Operation::Payload, count, 0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => *readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A peer that is gone has nothing more to say.
                Err(_) => self.input = Input::Ending,
            }
        }
        if let Input::Ending = self.input {
            self.input = Input::Closed;
            return Some(self.packet(Operation::Shutdown, 0, SHUTDOWN_SEND));
        }
        if self.credit_due || self.unannounced() >= CREDIT_STEP {
            return Some(self.packet(Operation::CreditUpdate, 0, 0));
        }
        None
    }

    fn take_payload(&mut self, payload: &mut Buffers<'_>) -> Fate {
        let length = payload.len();
        let Output::Open(output) = &self.output else {
            // The guest said that it would not send, or nobody listens.
            return Fate::Over { tell_guest: true };
        };
        if length > (RECEIVE_BUFFER as usize).saturating_sub(self.pending.len()) {
            // More than its credit (virtio 1.3 §5.10.6.3).
            return Fate::Over { tell_guest: true };
        }
        self.received += Wrapping(u32::try_from(length).unwrap_or(u32::MAX));
        if self.pending.is_empty() {
            while payload.len() > 0 {
                match payload.write_to(output.as_fd(), None) {
                    Ok(count) => {
                        self.delivered += count as u64;
                        payload.split_to(count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => return self.lose_output(),
                }
            }
        }
        let mut rest = vec![0; payload.len()];
        if payload.take(&mut rest) {
            self.pending.extend(rest);
        }
        Fate::Alive
    }

    fn end_output(&mut self) {
        match std::mem::replace(&mut self.output, Output::Closed) {
            Output::Open(descriptor) if !self.pending.is_empty() => self.output = Output::Draining(descriptor),
            output => {
                self.output = output;
                self.close_output();
            }
        }
    }

    /// Closes the output after its last byte.
    fn close_output(&mut self) {
        let output = std::mem::replace(&mut self.output, Output::Closed);
        if let (Output::Open(socket) | Output::Draining(socket), Input::Open { .. }) = (output, &self.input) {
            // Where both are the same socket, closing one of its descriptors tells the peer nothing.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
        }
    }

    /// The host's reader is gone: the guest's writer learns it, as it would from a pipe.
    fn lose_output(&mut self) -> Fate {
        self.pending = VecDeque::new();
        self.output = Output::Closed;
        Fate::Over {
            tell_guest: !self.guest_gone,
        }
    }

    fn fate(&self) -> Fate {
        let guest_done = self.guest_gone || self.guest_deaf && self.guest_mute;
        if guest_done && matches!(self.output, Output::Closed) {
            Fate::Over {
                tell_guest: !self.guest_gone,
            }
        } else {
            Fate::Alive
        }
    }

    /// How many bytes the guest can take now.
    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_buffer.saturating_sub(in_flight)
    }

    /// Payload bytes of the guest that have left our buffer, modulo 2^32.
    fn taken(&self) -> Wrapping<u32> {
        let held = u32::try_from(self.pending.len()).unwrap_or(RECEIVE_BUFFER);
        self.received - Wrapping(held)
    }

    fn unannounced(&self) -> u32 {
        (self.taken() - self.announced).0
    }

    fn packet(&mut self, operation: Operation, length: u32, flags: u32) -> Packet {
        self.credit_due = false;
        self.announced = self.taken();
        Packet {
            source_cid: nutshell_protocol::HOST_CID.into(),
            destination_cid: nutshell_protocol::GUEST_CID.into(),
            source_port: self.key.host,
            destination_port: self.key.guest,
            length,
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer: RECEIVE_BUFFER,
            forwarded: self.announced.0,
        }
    }
}
