//! The header of a vsock packet (virtio 1.3 §5.10.6), which precedes the payload.

/// The size of a header in bytes.
pub(super) const HEADER_SIZE: usize = 44;

/// VIRTIO_VSOCK_TYPE_STREAM, the only supported socket type.
pub(super) const TYPE_STREAM: u16 = 1;

/// Flag of [`Operation::Shutdown`]: the sender will receive no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// Flag of [`Operation::Shutdown`]: the sender will send no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// `enum virtio_vsock_op` (virtio 1.3 §5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Opens a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Closes a connection at once, or rejects a packet that belongs to no connection.
    Reset,
    /// Closes one or both directions.
    Shutdown,
    /// Carries payload.
    Payload,
    /// Reports the sender's credit, which every header contains.
    CreditUpdate,
    /// Requests a [`Self::CreditUpdate`].
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

/// `struct virtio_vsock_hdr`, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PacketHeader {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// The length of the payload in bytes.
    pub(super) length: u32,
    pub(super) socket_type: u16,
    /// `None` for an unknown operation.
    pub(super) operation: Option<Operation>,
    /// Their meaning depends on the operation.
    pub(super) flags: u32,
    /// The size of the sender's receive buffer in bytes.
    pub(super) buf_alloc: u32,
    /// The number of bytes that have left the sender's receive buffer since the connection was opened, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl PacketHeader {
    pub(super) fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u16_at = |offset: usize| u16::from_le_bytes([bytes[offset], bytes[offset + 1]]);
        let u32_at = |offset: usize| u32::from(u16_at(offset)) | u32::from(u16_at(offset + 2)) << 16;
        let u64_at = |offset: usize| u64::from(u32_at(offset)) | u64::from(u32_at(offset + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            destination_cid: u64_at(8),
            source_port: u32_at(16),
            destination_port: u32_at(20),
            length: u32_at(24),
            socket_type: u16_at(28),
            operation: Operation::parse(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut field = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        field(0, &self.source_cid.to_le_bytes());
        field(8, &self.destination_cid.to_le_bytes());
        field(16, &self.source_port.to_le_bytes());
        field(20, &self.destination_port.to_le_bytes());
        field(24, &self.length.to_le_bytes());
        field(28, &self.socket_type.to_le_bytes());
        field(30, &self.operation.map_or(0, Operation::value).to_le_bytes());
        field(32, &self.flags.to_le_bytes());
        field(36, &self.buf_alloc.to_le_bytes());
        field(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_a_round_trip() {
        let header = PacketHeader {
            source_cid: 3,
            destination_cid: 2,
            source_port: 0x1234_5678,
            destination_port: 1024,
            length: 77,
            socket_type: TYPE_STREAM,
            operation: Some(Operation::Payload),
            flags: SHUTDOWN_SEND,
            buf_alloc: 1 << 18,
            fwd_cnt: u32::MAX,
        };

        assert_eq!(PacketHeader::parse(&header.to_bytes()), header);
    }

    #[test]
    fn unknown_operation_parses_as_none() {
        let mut bytes = [0xff; HEADER_SIZE];
        assert_eq!(PacketHeader::parse(&bytes).operation, None);
        bytes[30..32].copy_from_slice(&[5, 0]);
        assert_eq!(PacketHeader::parse(&bytes).operation, Some(Operation::Payload));
    }
}
