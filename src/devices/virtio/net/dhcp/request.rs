//! Parses the frames of a DHCP client. The guest controls each byte.

use std::net::Ipv4Addr;

/// The UDP port of DHCP servers.
const SERVER_PORT: u16 = 67;

const ETHERTYPE_IPV4: u16 = 0x0800;

const PROTOCOL_UDP: u8 = 17;

/// The size of a UDP header in bytes.
const UDP_HEADER_SIZE: usize = 8;

/// The offset of the IPv4 header in a frame.
const IP_OFFSET: usize = 14;

/// The minimum size of an IPv4 header in bytes.
const MIN_IP_HEADER: usize = 20;

/// The number of bytes of a frame that [`is_for_server`] needs: the Ethernet header, the longest IPv4 header, and the
/// ports.
pub(in super::super) const MAX_HEADERS_SIZE: usize = IP_OFFSET + 60 + 4;

/// The maximum size of a request's frame, in bytes. Clients send at most a few hundred.
pub(in super::super) const MAX_REQUEST_SIZE: usize = IP_OFFSET + 1500;

/// The size of the fields before the options, in bytes, without the magic cookie (RFC 2131 §2).
pub(super) const FIXED_FIELDS: usize = 236;

/// The magic cookie before the options (RFC 2131 §3).
pub(super) const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];

/// The value of the field `op` in messages of clients.
const OP_REQUEST: u8 = 1;

/// Codes of options (RFC 2132, RFC 3397, RFC 3442).
pub(super) mod option {
    pub(in super::super) const PAD: u8 = 0;
    pub(in super::super) const SUBNET_MASK: u8 = 1;
    pub(in super::super) const ROUTER: u8 = 3;
    pub(in super::super) const DNS_SERVERS: u8 = 6;
    pub(in super::super) const HOST_NAME: u8 = 12;
    pub(in super::super) const DOMAIN_NAME: u8 = 15;
    pub(in super::super) const MTU: u8 = 26;
    pub(in super::super) const REQUESTED_ADDRESS: u8 = 50;
    pub(in super::super) const LEASE_TIME: u8 = 51;
    pub(in super::super) const OVERLOAD: u8 = 52;
    pub(in super::super) const MESSAGE_TYPE: u8 = 53;
    pub(in super::super) const SERVER_ID: u8 = 54;
    pub(in super::super) const MESSAGE: u8 = 56;
    pub(in super::super) const MAX_MESSAGE_SIZE: u8 = 57;
    pub(in super::super) const CLIENT_ID: u8 = 61;
    pub(in super::super) const SEARCH_LIST: u8 = 119;
    pub(in super::super) const CLASSLESS_ROUTES: u8 = 121;
    pub(in super::super) const END: u8 = 255;
}

/// Why a request has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in super::super) enum RequestError {
    #[error("it is incomplete or longer than {MAX_REQUEST_SIZE} bytes")]
    Truncated,
    #[error("it is not a DHCP request")]
    NotARequest,
    #[error("it is from a relay agent")]
    Relayed,
    #[error("option {0} is repeated or has a wrong length")]
    Option(u8),
    #[error("clients do not send DHCP messages of type {0}")]
    MessageType(u8),
    #[error("it contains no address")]
    NoAddress,
    #[error("the guest does not use its address {0}, because another machine of its network has the same address")]
    Declined(Ipv4Addr),
}

/// The messages of a client (RFC 2132 §9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestKind {
    Discover,
    Request,
    Decline,
    Release,
    Inform,
}

/// A message of a client.
#[derive(Debug)]
pub(super) struct Request<'f> {
    pub(super) kind: RequestKind,
    pub(super) hardware: HardwareAddress,
    /// The field `xid`.
    pub(super) transaction: [u8; 4],
    /// The field `flags`.
    pub(super) flags: [u8; 2],
    /// The field `ciaddr`: an address that the client uses already.
    pub(super) client_address: Option<Ipv4Addr>,
    pub(super) requested_address: Option<Ipv4Addr>,
    /// The server that the client selects.
    pub(super) server: Option<Ipv4Addr>,
    pub(super) client_id: Option<&'f [u8]>,
    /// The maximum size of an answer with its IP and UDP headers, in bytes.
    pub(super) max_answer: Option<u16>,
}

/// The fields `htype`, `hlen` and `chaddr`.
#[derive(Debug, Clone, Copy)]
pub(super) struct HardwareAddress {
    pub(super) kind: u8,
    pub(super) length: u8,
    pub(super) bytes: [u8; 16],
}

impl HardwareAddress {
    /// The MAC address, if it is an Ethernet address.
    pub(super) fn mac(&self) -> Option<[u8; 6]> {
        let [a, b, c, d, e, f, ..] = self.bytes;
        ((self.kind, self.length) == (1, 6)).then_some([a, b, c, d, e, f])
    }
}

/// Whether the frame that starts with `start` is a UDP datagram to the port of DHCP servers. Only the first
/// [`MAX_HEADERS_SIZE`] bytes matter.
pub(in super::super) fn is_for_server(start: &[u8]) -> bool {
    udp_offset(start).and_then(|offset| read_u16(start, offset + 2)) == Some(SERVER_PORT)
}

/// The offset of the UDP header. `None` if the frame has no IPv4 datagram with UDP, or only a fragment of one.
fn udp_offset(frame: &[u8]) -> Option<usize> {
    // The bit "more fragments" and the fragment's offset.
    const FRAGMENT_BITS: u16 = 0x3fff;
    let first = *frame.get(IP_OFFSET)?;
    let header_size = usize::from(first & 0xf) * 4;
    let is_whole_datagram = read_u16(frame, IP_OFFSET - 2)? == ETHERTYPE_IPV4
        && first >> 4 == 4
        && header_size >= MIN_IP_HEADER
        && read_u16(frame, IP_OFFSET + 6)? & FRAGMENT_BITS == 0
        && *frame.get(IP_OFFSET + 9)? == PROTOCOL_UDP;
    is_whole_datagram.then_some(IP_OFFSET + header_size)
}

/// The payload of a UDP datagram. Checksums are not checked: the frame comes from memory, and the guest may have left
/// them to the device (VIRTIO_NET_HDR_F_NEEDS_CSUM).
fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    let udp = udp_offset(frame)?;
    let end = IP_OFFSET + usize::from(read_u16(frame, IP_OFFSET + 2)?);
    let length = usize::from(read_u16(frame, udp + 4)?);
    frame.get(..end)?.get(udp..)?.get(UDP_HEADER_SIZE..length)
}

impl<'f> Request<'f> {
    /// Parses the Ethernet frame `frame`, for which [`is_for_server`] is true.
    pub(super) fn parse(frame: &'f [u8]) -> Result<Self, RequestError> {
        let message = udp_payload(frame).ok_or(RequestError::Truncated)?;
        let (fields, options) = message
            .split_first_chunk::<FIXED_FIELDS>()
            .ok_or(RequestError::Truncated)?;
        let options = options.strip_prefix(&MAGIC_COOKIE).ok_or(RequestError::NotARequest)?;
        if fields[0] != OP_REQUEST {
            return Err(RequestError::NotARequest);
        }
        if address_field(fields, 24).is_some() {
            return Err(RequestError::Relayed);
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&fields[28..44]);
        let mut found = Options::default();
        found.read(options)?;
        // The fields `file` and `sname` may contain options too (RFC 2131 §4.1).
        let overload = found.overload.unwrap_or(0);
        if overload & 1 != 0 {
            found.read(&fields[108..])?;
        }
        if overload & 2 != 0 {
            found.read(&fields[44..108])?;
        }
        Ok(Self {
            kind: found.kind.ok_or(RequestError::NotARequest)?,
            hardware: HardwareAddress {
                kind: fields[1],
                length: fields[2],
                bytes,
            },
            transaction: [fields[4], fields[5], fields[6], fields[7]],
            flags: [fields[10], fields[11]],
            client_address: address_field(fields, 12),
            requested_address: found.requested_address,
            server: found.server,
            client_id: found.client_id,
            max_answer: found.max_answer,
        })
    }
}

/// The options that the server reads.
#[derive(Debug, Default)]
struct Options<'f> {
    kind: Option<RequestKind>,
    requested_address: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<&'f [u8]>,
    max_answer: Option<u16>,
    overload: Option<u8>,
}

impl<'f> Options<'f> {
    /// Reads a field with options. Without an end option, the options end with the field.
    fn read(&mut self, mut field: &'f [u8]) -> Result<(), RequestError> {
        while let Some((code, rest)) = field.split_first() {
            match *code {
                option::PAD => field = rest,
                option::END => break,
                code => {
                    let (length, rest) = rest.split_first().ok_or(RequestError::Truncated)?;
                    let (value, rest) = rest.split_at_checked((*length).into()).ok_or(RequestError::Truncated)?;
                    self.set(code, value)?;
                    field = rest;
                }
            }
        }
        Ok(())
    }

    /// Sets the option `code`. All options that the server reads are short, so a client does not split them (RFC 3396),
    /// and a repeated one is an error.
    fn set(&mut self, code: u8, value: &'f [u8]) -> Result<(), RequestError> {
        let invalid = RequestError::Option(code);
        let is_new = match code {
            option::MESSAGE_TYPE => {
                let [number] = fixed(value).ok_or(invalid)?;
                self.kind.replace(request_kind(number)?).is_none()
            }
            option::REQUESTED_ADDRESS => {
                let address = fixed::<4>(value).ok_or(invalid)?.into();
                self.requested_address.replace(address).is_none()
            }
            option::SERVER_ID => {
                let address = fixed::<4>(value).ok_or(invalid)?.into();
                self.server.replace(address).is_none()
            }
            option::MAX_MESSAGE_SIZE => {
                let size = u16::from_be_bytes(fixed(value).ok_or(invalid)?);
                self.max_answer.replace(size).is_none()
            }
            option::OVERLOAD => {
                let [fields] = fixed(value).ok_or(invalid)?;
                self.overload.replace(fields).is_none()
            }
            option::CLIENT_ID => self.client_id.replace(value).is_none(),
            _ => true,
        };
        is_new.then_some(()).ok_or(invalid)
    }
}

fn request_kind(number: u8) -> Result<RequestKind, RequestError> {
    match number {
        1 => Ok(RequestKind::Discover),
        3 => Ok(RequestKind::Request),
        4 => Ok(RequestKind::Decline),
        7 => Ok(RequestKind::Release),
        8 => Ok(RequestKind::Inform),
        other => Err(RequestError::MessageType(other)),
    }
}

/// The address at `offset`, unless it is 0.0.0.0.
fn address_field(fields: &[u8; FIXED_FIELDS], offset: usize) -> Option<Ipv4Addr> {
    let address = Ipv4Addr::from(fixed::<4>(fields.get(offset..offset + 4)?)?);
    (!address.is_unspecified()).then_some(address)
}

fn fixed<const SIZE: usize>(value: &[u8]) -> Option<[u8; SIZE]> {
    value.try_into().ok()
}

fn read_u16(frame: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes(fixed(frame.get(offset..offset + 2)?)?))
}
