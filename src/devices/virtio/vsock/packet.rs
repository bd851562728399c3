//! The header of a vsock packet (virtio 1.3 §5.10.6): 44 bytes, little-endian, before its payload.

/// The length of a header in bytes.
pub(crate) const HEADER: usize = 44;

/// The one socket type that we serve (`VIRTIO_VSOCK_TYPE_STREAM`).
pub(crate) const STREAM: u16 = 1;

/// SHUTDOWN: the sender will not receive any more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;

/// SHUTDOWN: the sender will not send any more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (virtio 1.3 §5.10.6, `virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Open a connection.
    Request,
    /// The connection is open.
    Response,
    /// The connection is no more, or never was.
    Reset,
    /// The sender has ended a direction.
    Shutdown,
    /// Payload.
    Payload,
    /// How much the sender can take.
    CreditUpdate,
    /// Asks for a [`Self::CreditUpdate`].
    CreditRequest,
}

impl Operation {
    fn parse(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Payload,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn value(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Payload => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A parsed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    /// The sender's context id.
    pub(crate) source_cid: u64,
    /// The receiver's context id.
    pub(crate) destination_cid: u64,
    /// The sender's port.
    pub(crate) source_port: u32,
    /// The receiver's port.
    pub(crate) destination_port: u32,
    /// The payload's length in bytes.
    pub(crate) length: u32,
    /// The socket type.
    pub(crate) kind: u16,
    /// `None` for one that the standard does not know.
    pub(crate) operation: Option<Operation>,
    /// Depends on the operation.
    pub(crate) flags: u32,
    /// The size of the sender's receive buffer in bytes.
    pub(crate) buffer: u32,
    /// How many bytes the sender has taken out of it since the connection was opened, modulo 2^32.
    pub(crate) forwarded: u32,
}

impl Packet {
    /// Parses a header.
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            operation: Operation::parse(half(30)),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// The header's bytes.
    pub(crate) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut field = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        field(0, &self.source_cid.to_le_bytes());
        field(8, &self.destination_cid.to_le_bytes());
        field(16, &self.source_port.to_le_bytes());
        field(20, &self.destination_port.to_le_bytes());
        field(24, &self.length.to_le_bytes());
        field(28, &self.kind.to_le_bytes());
        field(30, &self.operation.map_or(0, Operation::value).to_le_bytes());
        field(32, &self.flags.to_le_bytes());
        field(36, &self.buffer.to_le_bytes());
        field(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_a_round_trip() {
        let packet = Packet {
            source_cid: 3,
            destination_cid: 2,
            source_port: 0x1234_5678,
            destination_port: 1024,
            length: 77,
            kind: STREAM,
            operation: Some(Operation::Payload),
            flags: SHUTDOWN_SEND,
            buffer: 1 << 18,
            forwarded: u32::MAX,
        };
        assert_eq!(Packet::parse(&packet.bytes()), packet);
    }

    #[test]
    fn unknown_operation_parses_as_none() {
        let mut bytes = [0xff; HEADER];
        assert_eq!(Packet::parse(&bytes).operation, None);
        bytes[30..32].copy_from_slice(&[5, 0]);
        assert_eq!(Packet::parse(&bytes).operation, Some(Operation::Payload));
    }
}
