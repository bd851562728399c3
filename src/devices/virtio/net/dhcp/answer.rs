//! Builds the frames of the server.

use std::net::Ipv4Addr;

use super::{
    parameters::{Configuration, Parameter},
    request::{FIXED_FIELDS, MAGIC_COOKIE, Request, option},
};

/// The source of the frames, a locally administered address. It never appears on the network: the frames go only to the
/// guest.
const SERVER_MAC: [u8; 6] = [0x02, b'n', b'u', b't', b's', b'h'];

const BROADCAST_MAC: [u8; 6] = [0xff; 6];

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

const IP_HEADER_SIZE: usize = 20;
const UDP_HEADER_SIZE: usize = 8;

/// The value of the field `op` in messages of servers.
const OP_REPLY: u8 = 2;

/// The flag of clients that cannot receive unicast packets before they have an address (RFC 2131 §2).
const BROADCAST_FLAG: u8 = 0x80;

/// The size of an answer, with its IP and UDP headers, that each client must accept, in bytes (RFC 2131 §2).
const MIN_ANSWER_LIMIT: u16 = 576;

/// The maximum size of an answer, with its IP and UDP headers, in bytes.
const MAX_ANSWER: u16 = 1500;

/// The minimum size of a message in bytes (RFC 1542 §2.1). Some clients drop shorter ones.
const MIN_MESSAGE: usize = 300;

/// A lease time without end (RFC 2131 §3.3).
const INFINITE: [u8; 4] = [0xff; 4];

/// The maximum length of an option's value. Longer values are split (RFC 3396).
const MAX_VALUE: usize = 255;

/// A frame for the guest.
#[derive(Debug)]
pub(in super::super) struct Answer {
    /// The Ethernet frame, with all checksums.
    pub(in super::super) frame: Vec<u8>,
    /// The codes of options that are missing or truncated in the frame, because the client's limit is too small.
    pub(in super::super) incomplete_options: Vec<u8>,
}

/// The messages of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnswerKind {
    /// DHCPOFFER.
    Offer,
    /// DHCPACK with the lease.
    Acknowledgement,
    /// DHCPACK without a lease, for a client that has an address.
    Configuration,
    /// DHCPNAK.
    Refusal,
}

/// The answer to `request`.
pub(super) fn build(configuration: &Configuration, request: &Request<'_>, kind: AnswerKind) -> Answer {
    let limit = request
        .max_answer
        .unwrap_or(MIN_ANSWER_LIMIT)
        .min(configuration.mtu)
        .clamp(MIN_ANSWER_LIMIT, MAX_ANSWER);
    let options_limit = usize::from(limit) - IP_HEADER_SIZE - UDP_HEADER_SIZE - FIXED_FIELDS - MAGIC_COOKIE.len();
    let options = build_options(configuration, request, kind, options_limit);

    let leased = match kind {
        AnswerKind::Offer | AnswerKind::Acknowledgement => Some(configuration.leased),
        AnswerKind::Configuration | AnswerKind::Refusal => None,
    };
    let mut message = build_fields(request, kind, leased).to_vec();
    message.extend(MAGIC_COOKIE);
    message.extend(options.bytes);
    message.push(option::END);
    message.resize(message.len().max(MIN_MESSAGE), option::PAD);

    let (mac, address) = destination(request, kind, leased);
    Answer {
        frame: build_frame(configuration.server, mac, address, &message),
        incomplete_options: options.incomplete,
    }
}

/// The fields before the options (RFC 2131 §4.3.1, table 3).
fn build_fields(request: &Request<'_>, kind: AnswerKind, leased: Option<Ipv4Addr>) -> [u8; FIXED_FIELDS] {
    let client_address = match kind {
        AnswerKind::Acknowledgement | AnswerKind::Configuration => request.client_address,
        AnswerKind::Offer | AnswerKind::Refusal => None,
    };
    let octets = |address: Option<Ipv4Addr>| address.unwrap_or(Ipv4Addr::UNSPECIFIED).octets();
    let mut fields = [0; FIXED_FIELDS];
    fields[..3].copy_from_slice(&[OP_REPLY, request.hardware.kind, request.hardware.length]);
    fields[4..8].copy_from_slice(&request.transaction);
    fields[10..12].copy_from_slice(&request.flags);
    fields[12..16].copy_from_slice(&octets(client_address));
    fields[16..20].copy_from_slice(&octets(leased));
    fields[28..44].copy_from_slice(&request.hardware.bytes);
    fields
}

/// The destination of an answer (RFC 2131 §4.1). It is a broadcast if there is no address for a unicast.
fn destination(request: &Request<'_>, kind: AnswerKind, leased: Option<Ipv4Addr>) -> ([u8; 6], Ipv4Addr) {
    let broadcast = (BROADCAST_MAC, Ipv4Addr::BROADCAST);
    if kind == AnswerKind::Refusal {
        return broadcast;
    }
    let wants_broadcast = request.flags[0] & BROADCAST_FLAG != 0;
    let address = request.client_address.or(leased.filter(|_| !wants_broadcast));
    request.hardware.mac().zip(address).unwrap_or(broadcast)
}

/// The options of an answer, in at most `limit` bytes with the end option.
fn build_options(configuration: &Configuration, request: &Request<'_>, kind: AnswerKind, limit: usize) -> OptionsField {
    let message_type = match kind {
        AnswerKind::Offer => 2,
        AnswerKind::Acknowledgement | AnswerKind::Configuration => 5,
        AnswerKind::Refusal => 6,
    };
    let mut options = OptionsField {
        bytes: Vec::with_capacity(limit),
        limit: limit - 1,
        incomplete: Vec::new(),
    };
    options.push(option::MESSAGE_TYPE, &[message_type]);
    options.push(option::SERVER_ID, &configuration.server.octets());
    // RFC 6842.
    if let Some(client_id) = request.client_id {
        options.push(option::CLIENT_ID, client_id);
    }
    if kind == AnswerKind::Refusal {
        let text = format!("the address of this link is {}", configuration.leased);
        options.push(option::MESSAGE, text.as_bytes());
        return options;
    }
    // An answer without a lease must not have a lease time (RFC 2131 §4.3.5).
    if kind != AnswerKind::Configuration {
        options.push(option::LEASE_TIME, &INFINITE);
    }
    for parameter in &configuration.parameters {
        options.push_elements(parameter);
    }
    options
}

/// The options of an answer.
struct OptionsField {
    bytes: Vec<u8>,
    /// The maximum size of `bytes`.
    limit: usize,
    /// The codes of options that do not fit, or fit only in part.
    incomplete: Vec<u8>,
}

impl OptionsField {
    /// Appends an option if it fits.
    fn push(&mut self, code: u8, value: &[u8]) {
        if encoded_size(value.len()) > self.limit - self.bytes.len() {
            self.incomplete.push(code);
            return;
        }
        let mut push_part = |part: &[u8]| {
            // Fits: at most MAX_VALUE.
            self.bytes.extend([code, u8::try_from(part.len()).unwrap_or(u8::MAX)]);
            self.bytes.extend(part);
        };
        if value.is_empty() {
            push_part(value);
        }
        value.chunks(MAX_VALUE).for_each(push_part);
    }

    /// Appends as many elements of an option as fit.
    fn push_elements(&mut self, parameter: &Parameter) {
        let free = self.limit - self.bytes.len();
        let mut value = Vec::new();
        for element in &parameter.elements {
            if encoded_size(value.len() + element.len()) > free {
                self.incomplete.push(parameter.code);
                break;
            }
            value.extend(element);
        }
        if !value.is_empty() {
            self.push(parameter.code, &value);
        }
    }
}

/// The size of an option with a value of `length` bytes.
fn encoded_size(length: usize) -> usize {
    length + 2 * length.div_ceil(MAX_VALUE).max(1)
}

/// An Ethernet frame with a UDP datagram to the port of clients.
fn build_frame(source: Ipv4Addr, mac: [u8; 6], destination: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    // Fit: a message has at most MAX_ANSWER bytes.
    let udp_length = u16::try_from(UDP_HEADER_SIZE + message.len()).unwrap_or(u16::MAX);
    let total_length = u16::try_from(IP_HEADER_SIZE + UDP_HEADER_SIZE + message.len()).unwrap_or(u16::MAX);
    let [high, low] = total_length.to_be_bytes();
    // Version and header size, length, "don't fragment", time to live 64, UDP.
    let mut ip = [0x45, 0, high, low, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..].copy_from_slice(&destination.octets());
    let ip_checksum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&ip_checksum.to_be_bytes());

    let mut udp = [0; UDP_HEADER_SIZE];
    udp[..2].copy_from_slice(&SERVER_PORT.to_be_bytes());
    udp[2..4].copy_from_slice(&CLIENT_PORT.to_be_bytes());
    udp[4..6].copy_from_slice(&udp_length.to_be_bytes());
    let [high, low] = udp_length.to_be_bytes();
    // The pseudo header has the addresses, the protocol and the length (RFC 768).
    let udp_checksum = match checksum(&[&ip[12..], &[0, 17, high, low], &udp, message]) {
        // Zero means that there is no checksum.
        0 => u16::MAX,
        sum => sum,
    };
    udp[6..].copy_from_slice(&udp_checksum.to_be_bytes());

    let ethernet = [&mac[..], &SERVER_MAC, &[0x08, 0x00]].concat();
    [&ethernet[..], &ip, &udp, message].concat()
}

/// The internet checksum (RFC 1071). All parts but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Fits after the loop.
    !u16::try_from(sum).unwrap_or(u16::MAX)
}
