//! A client of the server: builds its frames, and reads answers with dhcproto.

use std::{collections::BTreeMap, net::Ipv4Addr};

use dhcproto::{
    Decodable, Decoder,
    v4::{DhcpOption, Message, Opcode, OptionCode},
};

use super::{DISCOVER, address, option};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub(super) const TRANSACTION: u32 = 0x1234_5678;

/// The sizes of the headers of an answer: Ethernet, IPv4, UDP.
const HEADERS: usize = 14 + 20 + 8;

/// A DHCP message as bytes. Tests change single fields of it.
#[derive(Clone)]
pub(super) struct ClientMessage {
    pub(super) fields: [u8; 236],
    pub(super) options: Vec<u8>,
}

impl ClientMessage {
    pub(super) fn new(kind: u8) -> Self {
        let mut fields = [0; 236];
        fields[..3].copy_from_slice(&[1, 1, 6]);
        fields[4..8].copy_from_slice(&TRANSACTION.to_be_bytes());
        fields[28..34].copy_from_slice(&MAC);
        Self {
            fields,
            options: vec![option::MESSAGE_TYPE, 1, kind],
        }
    }

    pub(super) fn field(mut self, offset: usize, value: &[u8]) -> Self {
        self.fields[offset..offset + value.len()].copy_from_slice(value);
        self
    }

    pub(super) fn client_address(self, text: &str) -> Self {
        self.field(12, &address(text).octets())
    }

    pub(super) fn option(mut self, code: u8, value: &[u8]) -> Self {
        self.options.extend([code, u8::try_from(value.len()).unwrap()]);
        self.options.extend(value);
        self
    }

    pub(super) fn address_option(self, code: u8, text: &str) -> Self {
        self.option(code, &address(text).octets())
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let message = [&self.fields[..], &[99, 130, 83, 99], &self.options, &[255]].concat();
        udp_frame(67, &message)
    }
}

/// The frame of a client that looks for a server.
pub(in super::super::super) fn discover_frame() -> Vec<u8> {
    ClientMessage::new(DISCOVER).frame()
}

/// A broadcast with a UDP datagram to `port`, without checksums, as for a device with checksum offload.
pub(in super::super::super) fn udp_frame(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = |headers: usize| u16::try_from(headers + payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([0x08, 0, 0x45, 0]);
    frame.extend(length(28));
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 68]);
    frame.extend(port.to_be_bytes());
    frame.extend(length(8));
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// The message in the frame of an answer, and the frame's Ethernet and IPv4 destinations.
pub(super) struct Received {
    pub(super) message: Message,
    pub(super) mac: [u8; 6],
    pub(super) destination: Ipv4Addr,
}

impl Received {
    /// Reads a frame, whose headers and checksums must be correct.
    pub(super) fn parse(frame: &[u8], server: &str) -> Self {
        let total_length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        assert_eq!((frame[12..15].to_vec(), frame[23]), (vec![0x08, 0, 0x45], 17));
        assert_eq!(total_length, frame.len() - 14);
        assert_eq!(ones_complement_sum(&frame[14..34]), 0xffff);
        assert_eq!(frame[26..30], address(server).octets());
        assert_eq!(frame[34..38], [0, 67, 0, 68]);
        assert_eq!(frame[38..40], u16::try_from(frame.len() - 34).unwrap().to_be_bytes());
        let pseudo_header = [&frame[26..34], &[0, 17], &frame[38..40]].concat();
        assert_ne!(frame[40..42], [0, 0]);
        assert_eq!(ones_complement_sum(&[&pseudo_header, &frame[34..]].concat()), 0xffff);
        let message = Message::decode(&mut Decoder::new(&frame[HEADERS..])).unwrap();
        assert_eq!(
            (message.opcode(), message.hops(), message.secs()),
            (Opcode::BootReply, 0, 0)
        );
        Self {
            message,
            mac: frame[..6].try_into().unwrap(),
            destination: <[u8; 4]>::try_from(&frame[30..34]).unwrap().into(),
        }
    }

    pub(super) fn options(&self) -> BTreeMap<OptionCode, DhcpOption> {
        self.message
            .opts()
            .iter()
            .map(|(code, value)| (*code, value.clone()))
            .collect()
    }
}

fn ones_complement_sum(bytes: &[u8]) -> u64 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) * 256 + pair.get(1).map_or(0, |low| u64::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = sum / 0x1_0000 + sum % 0x1_0000;
    }
    sum
}
