//! The messages of the name relay ([`crate::Request::RelayNames`]): queries from the guest, answers from the host. They
//! have the framing of the agent stream, and use a separate stream.

use serde::{Deserialize, Serialize};

/// The largest body of a frame, in bytes: a DNS message has at most 65,535 (RFC 1035, section 4.2.2).
pub const MAX_NAME_FRAME: usize = 65_535 + 16;

/// The largest number of queries that wait for an answer. Both ends drop those beyond; clients repeat them.
pub const MAX_NAME_QUERIES: usize = 64;

/// A query of a process in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameQuery {
    /// Chosen by the agent; the [`NameAnswer`] repeats it.
    pub id: u32,
    /// Whether the process used TCP. Otherwise it used UDP, and the resolver truncates a long answer.
    pub tcp: bool,
    /// The DNS message, without the length that precedes it in TCP.
    pub message: Vec<u8>,
}

/// The resolver's answer to a query. There is none if the resolver does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameAnswer {
    /// The id of the query.
    pub id: u32,
    /// The DNS message, without the length that precedes it in TCP.
    pub message: Vec<u8>,
}
