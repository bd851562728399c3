//! The state machine of one connection between a guest's socket and file descriptors of the host. It handles packets
//! and descriptors; the muxer moves the packets to and from the queues.
//!
//! ```text
//!            ┌─ guest sends ──▶ pending ──▶ output        ends: guest's SHUTDOWN(SEND), then drained
//! connection │
//!            └─ guest receives ◀────────── input          ends: end of file, or guest's SHUTDOWN(RECEIVE)
//! ```
//!
//! Each direction ends independently. When the guest has shut down both directions and all of its data is written, it
//! gets a RESET and the connection is closed: this is how a socket is released after an orderly shutdown (virtio 1.3
//! §5.10.6.5). An earlier RESET could make the guest lose data that it has not read yet.

use std::{
    collections::VecDeque,
    io,
    num::Wrapping,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::packet::{Operation, PacketHeader, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::devices::virtio::buffers::Buffers;

/// The guest's credit: the maximum number of its bytes that a connection buffers while the host's reader is slow.
pub(super) const RECEIVE_BUFFER_SIZE: u32 = 256 << 10;

/// A CREDIT_UPDATE is due when the reader has taken this many bytes since the last report to the guest.
const CREDIT_UPDATE_THRESHOLD: u32 = RECEIVE_BUFFER_SIZE / 4;

/// The maximum payload of a packet to the guest, in bytes. Linux receives it in one buffer.
const MAX_PAYLOAD_SIZE: usize = 64 << 10;

/// The ports that identify a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnectionKey {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// The direction from the guest to the host.
#[derive(Debug)]
enum Output {
    /// The guest may send.
    Open(OwnedFd),
    /// The guest has sent its last byte; pending bytes are still written.
    Draining(OwnedFd),
    Closed,
}

/// The direction from the host to the guest.
#[derive(Debug)]
enum Input {
    /// There may be more to read.
    Open {
        descriptor: OwnedFd,
        /// Edge-triggered readiness: the poller sets it, EAGAIN clears it.
        readable: bool,
    },
    /// End of file was read; a SHUTDOWN to the guest is due.
    EndOfFile,
    Closed,
}

/// Why a stream lost data or ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamFailure {
    #[error("queue 1: output of a process is lost: the host cannot write it: {0}")]
    Write(#[source] io::Error),
    #[error("queue 0: input of a process ends early: the host cannot read it: {0}")]
    Read(#[source] io::Error),
    #[error("queue 1: the stream is closed because the guest {0}")]
    Protocol(&'static str),
}

/// Whether the muxer keeps a connection after a packet or an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ConnectionStatus {
    Open,
    /// Remove the connection and, if `send_reset`, send a RESET to the guest.
    Closed {
        send_reset: bool,
    },
}

#[derive(Debug)]
pub(super) struct Connection {
    key: ConnectionKey,
    input: Input,
    output: Output,
    /// Bytes from the guest that the host's reader has not taken yet; at most [`RECEIVE_BUFFER_SIZE`].
    pending: VecDeque<u8>,
    /// The total number of bytes written to the output.
    delivered: u64,
    /// The total number of payload bytes received from the guest.
    received: Wrapping<u32>,
    /// The value of [`Self::fwd_cnt`] in the last packet to the guest.
    reported_fwd_cnt: Wrapping<u32>,
    /// The total number of payload bytes sent to the guest.
    sent: Wrapping<u32>,
    /// The credit fields of the guest's last packet.
    guest_buf_alloc: u32,
    guest_fwd_cnt: Wrapping<u32>,
    response_due: bool,
    credit_update_due: bool,
    guest_receive_shut_down: bool,
    guest_send_shut_down: bool,
    /// The guest has sent a RESET: it gets no more packets.
    guest_reset: bool,
    failure: Option<StreamFailure>,
}

impl Connection {
    /// Accepts the guest's `request`. The descriptors must be non-blocking.
    pub(super) fn accept(request: &PacketHeader, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            key: ConnectionKey {
                guest_port: request.source_port,
                host_port: request.destination_port,
            },
            input: input.map_or(Input::Closed, |descriptor| Input::Open {
                descriptor,
                readable: true,
            }),
            output: output.map_or(Output::Closed, Output::Open),
            pending: VecDeque::new(),
            delivered: 0,
            received: Wrapping(0),
            reported_fwd_cnt: Wrapping(0),
            sent: Wrapping(0),
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: Wrapping(request.fwd_cnt),
            response_due: true,
            credit_update_due: false,
            guest_receive_shut_down: false,
            guest_send_shut_down: false,
            guest_reset: false,
            failure: None,
        }
    }

    /// The descriptor to read from, for polling.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.input {
            Input::Open { descriptor, .. } => Some(descriptor.as_fd()),
            Input::EndOfFile | Input::Closed => None,
        }
    }

    /// The descriptor to write to, for polling.
    pub(super) fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.output {
            Output::Open(descriptor) | Output::Draining(descriptor) => Some(descriptor.as_fd()),
            Output::Closed => None,
        }
    }

    /// The total number of bytes written to the output.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The number of bytes from the guest that the host's reader has not taken yet.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// The failure since the last call.
    pub(super) fn take_failure(&mut self) -> Option<StreamFailure> {
        self.failure.take()
    }

    /// Handles a packet from the guest.
    pub(super) fn receive(&mut self, header: &PacketHeader, payload: &mut Buffers<'_>) -> ConnectionStatus {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = Wrapping(header.fwd_cnt);
        match header.operation {
            Some(Operation::Payload) => return self.take_payload(payload),
            Some(Operation::Shutdown) => {
                if header.flags & SHUTDOWN_RECEIVE != 0 {
                    self.guest_receive_shut_down = true;
                    self.input = Input::Closed;
                }
                if header.flags & SHUTDOWN_SEND != 0 {
                    self.guest_send_shut_down = true;
                    self.end_output();
                }
            }
            Some(Operation::Reset) => {
                self.guest_reset = true;
                self.input = Input::Closed;
                self.end_output();
            }
            Some(Operation::CreditRequest) => self.credit_update_due = true,
            Some(Operation::CreditUpdate) => {}
            // Only the guest opens connections, and this one is open already.
            Some(Operation::Request | Operation::Response) | None => {
                return self.close_for_violation("sent a packet that is invalid on an open stream");
            }
        }
        self.status()
    }

    /// Marks the input as possibly readable.
    pub(super) fn set_input_ready(&mut self) {
        if let Input::Open { readable, .. } = &mut self.input {
            *readable = true;
        }
    }

    /// Writes pending bytes. Call it when the output may be writable.
    pub(super) fn flush_output(&mut self) -> ConnectionStatus {
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
                Err(error) => return self.close_broken_output(error.into()),
            }
        }
        if self.pending.is_empty() {
            // Free the memory of a burst.
            self.pending = VecDeque::new();
            if let Output::Draining(_) = self.output {
                self.close_output();
            }
        }
        self.status()
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        if self.guest_reset {
            return false;
        }
        let readable = matches!(self.input, Input::Open { readable: true, .. }) && self.guest_credit() > 0;
        self.response_due || readable || matches!(self.input, Input::EndOfFile) || self.is_credit_update_due()
    }

    /// Returns the next packet for the guest. Its payload is read directly into `space`, which must not be empty.
    /// `None` means that there is no packet after all; then the space is unused.
    pub(super) fn next_packet(&mut self, space: &Buffers<'_>) -> Option<PacketHeader> {
        if self.response_due {
            self.response_due = false;
            return Some(self.packet(Operation::Response, 0, 0));
        }
        let credit = self.guest_credit() as usize;
        if let Input::Open { descriptor, readable } = &mut self.input
            && *readable
            && credit > 0
        {
            let space = space.prefix(credit.min(MAX_PAYLOAD_SIZE));
            match space.read_from(descriptor.as_fd(), None) {
                Ok(0) => self.input = Input::EndOfFile,
                Ok(count) => {
                    // Fits: at most MAX_PAYLOAD_SIZE.
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    self.sent += Wrapping(count);
                    return Some(self.packet(Operation::Payload, count, 0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => *readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // After an error, the input yields no more data.
                Err(error) => {
                    self.failure = Some(StreamFailure::Read(error));
                    self.input = Input::EndOfFile;
                }
            }
        }
        if let Input::EndOfFile = self.input {
            self.input = Input::Closed;
            return Some(self.packet(Operation::Shutdown, 0, SHUTDOWN_SEND));
        }
        if self.is_credit_update_due() {
            return Some(self.packet(Operation::CreditUpdate, 0, 0));
        }
        None
    }

    /// Writes the payload to the output, and keeps the part that the output does not take.
    fn take_payload(&mut self, payload: &mut Buffers<'_>) -> ConnectionStatus {
        let length = payload.len();
        let Output::Open(output) = &self.output else {
            return self.close_for_violation("sent data after the end of its output, or to a stream without output");
        };
        if length > (RECEIVE_BUFFER_SIZE as usize).saturating_sub(self.pending.len()) {
            // Virtio 1.3 §5.10.6.3.
            return self.close_for_violation("sent more than its credit");
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
                    Err(error) => return self.close_broken_output(error),
                }
            }
        }
        let mut unwritten = vec![0; payload.len()];
        if payload.take(&mut unwritten) {
            self.pending.extend(unwritten);
        }
        ConnectionStatus::Open
    }

    /// Closes the output as soon as nothing is pending. A guest may end a stream twice, by SHUTDOWN and later by RESET.
    fn end_output(&mut self) {
        match std::mem::replace(&mut self.output, Output::Closed) {
            Output::Open(descriptor) | Output::Draining(descriptor) if !self.pending.is_empty() => {
                self.output = Output::Draining(descriptor);
            }
            output => {
                self.output = output;
                self.close_output();
            }
        }
    }

    /// Closes the output. Call this only when no bytes are pending.
    fn close_output(&mut self) {
        let output = std::mem::replace(&mut self.output, Output::Closed);
        if let (Output::Open(socket) | Output::Draining(socket), Input::Open { .. }) = (output, &self.input) {
            // If input and output are the same socket, closing one descriptor does not send end of file to the peer.
            // Fails if the output is not a socket, or if the peer is gone.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
        }
    }

    fn close_for_violation(&mut self, violation: &'static str) -> ConnectionStatus {
        self.failure = Some(StreamFailure::Protocol(violation));
        ConnectionStatus::Closed { send_reset: true }
    }

    /// Ends the connection because a write to its output failed. The RESET makes the guest's writes fail, as with a
    /// broken pipe.
    fn close_broken_output(&mut self, error: io::Error) -> ConnectionStatus {
        // That a reader closes its end is no failure.
        if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
            self.failure = Some(StreamFailure::Write(error));
        }
        self.pending = VecDeque::new();
        self.output = Output::Closed;
        ConnectionStatus::Closed {
            send_reset: !self.guest_reset,
        }
    }

    fn status(&self) -> ConnectionStatus {
        let guest_done = self.guest_reset || self.guest_receive_shut_down && self.guest_send_shut_down;
        if guest_done && matches!(self.output, Output::Closed) {
            ConnectionStatus::Closed {
                send_reset: !self.guest_reset,
            }
        } else {
            ConnectionStatus::Open
        }
    }

    /// The number of bytes that the guest can receive now.
    fn guest_credit(&self) -> u32 {
        credit(self.guest_buf_alloc, self.sent, self.guest_fwd_cnt)
    }

    /// The number of the guest's payload bytes that have left the receive buffer, modulo 2^32.
    fn fwd_cnt(&self) -> Wrapping<u32> {
        let held = u32::try_from(self.pending.len()).unwrap_or(RECEIVE_BUFFER_SIZE);
        self.received - Wrapping(held)
    }

    fn is_credit_update_due(&self) -> bool {
        self.credit_update_due || (self.fwd_cnt() - self.reported_fwd_cnt).0 >= CREDIT_UPDATE_THRESHOLD
    }

    /// The header of a packet to the guest. Each header also reports the credit.
    fn packet(&mut self, operation: Operation, length: u32, flags: u32) -> PacketHeader {
        self.credit_update_due = false;
        self.reported_fwd_cnt = self.fwd_cnt();
        PacketHeader {
            source_cid: nutshell_protocol::HOST_CID.into(),
            destination_cid: nutshell_protocol::GUEST_CID.into(),
            source_port: self.key.host_port,
            destination_port: self.key.guest_port,
            length,
            socket_type: TYPE_STREAM,
            operation: Some(operation),
            flags,
            buf_alloc: RECEIVE_BUFFER_SIZE,
            fwd_cnt: self.reported_fwd_cnt.0,
        }
    }
}

/// The number of bytes that fit into a receive buffer of `buf_alloc` bytes, when `sent` bytes were sent to it and
/// `fwd_cnt` have left it, both modulo 2^32 (virtio 1.3 §5.10.6.3).
fn credit(buf_alloc: u32, sent: Wrapping<u32>, fwd_cnt: Wrapping<u32>) -> u32 {
    let in_flight = (sent - fwd_cnt).0;
    buf_alloc.saturating_sub(in_flight)
}

#[cfg(test)]
mod tests {
    use arbtest::arbtest;

    use super::*;

    #[test]
    fn sender_that_uses_all_its_credit_never_overfills_the_buffer() {
        arbtest(|input| {
            let buf_alloc: u32 = input.arbitrary()?;
            // The counters start anywhere, because they wrap.
            let start = Wrapping(input.arbitrary::<u32>()?);
            let (mut sent, mut fwd_cnt) = (start, start);
            let mut buffered: u64 = 0;
            for _ in 0..input.int_in_range(0..=32)? {
                let credit = credit(buf_alloc, sent, fwd_cnt);
                let count = input.int_in_range(0..=credit)?;
                sent += count;
                buffered += u64::from(count);
                assert!(buffered <= u64::from(buf_alloc));

                let taken = input.int_in_range(0..=buffered)?;
                buffered -= taken;
                fwd_cnt += u32::try_from(taken).unwrap();
                let free = u64::from(buf_alloc) - buffered;
                assert_eq!(u64::from(super::credit(buf_alloc, sent, fwd_cnt)), free);
            }
            Ok(())
        })
        .size_max(512)
        .budget_ms(500);
    }

    #[test]
    fn credit_and_bytes_in_flight_fit_into_the_buffer_also_when_the_counters_wrap() {
        let sizes = [0, 1, 2, 4096, RECEIVE_BUFFER_SIZE, 1 << 31, u32::MAX - 1, u32::MAX];
        for buf_alloc in sizes {
            for in_flight in sizes {
                for fwd_cnt in [0, 1, 1 << 31, u32::MAX - 4096, u32::MAX] {
                    let fwd_cnt = Wrapping(fwd_cnt);
                    let credit = credit(buf_alloc, fwd_cnt + Wrapping(in_flight), fwd_cnt);
                    let expected = u64::from(buf_alloc).saturating_sub(in_flight.into());
                    assert_eq!(u64::from(credit), expected, "{buf_alloc} {in_flight} {fwd_cnt}");
                }
            }
        }
    }
}
