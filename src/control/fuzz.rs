//! Packets of the control channel from the bytes of a fuzz target's input.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, send};

use super::Channel;

/// The maximum number of packets of an input. A socket takes many more without a reader.
const MAX_PACKETS: usize = 20;

/// Sends the packets in `data` over `channel`. The length of each is before it, in two bytes.
pub(crate) fn send_packets(channel: &Channel, data: &[u8]) {
    for packet in packets(data) {
        let socket = std::os::fd::AsFd::as_fd(channel).as_raw_fd();
        send(socket, packet, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).unwrap();
    }
}

/// The packets in `data`, none of which is empty: an empty packet would mean the end of the channel.
fn packets(mut data: &[u8]) -> Vec<&[u8]> {
    let mut packets = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk()
        && packets.len() < MAX_PACKETS
    {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (packet, rest) = rest.split_at(length);
        if !packet.is_empty() {
            packets.push(packet);
        }
        data = rest;
    }
    packets
}
