//! Directs connections to any loopback port of a network namespace to one listening socket.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::libc;
use nutshell_linux::{
    bpf::Instruction,
    sk_lookup::{self, FAMILY_OFFSET, LOCAL_IP4_OFFSET, LOCAL_IP6_OFFSET, PACKET, PROTOCOL_OFFSET, SELECTED},
};

/// The last word of `::1`, in network byte order.
const LAST_WORD_OF_LOOPBACK: i32 = 1_i32.to_be();

/// Selects socket 0 for TCP to 127.0.0.0/8, and socket 1 for TCP to ::1.
const SELECTION: [Instruction; 19] = {
    const fn none(from: i16) -> i16 {
        sk_lookup::select_none(from, 19)
    }
    [
        Instruction::load32(2, PACKET, PROTOCOL_OFFSET),
        Instruction::jump_if_not_equal64(2, libc::IPPROTO_TCP, none(1)),
        Instruction::load32(3, PACKET, FAMILY_OFFSET),
        Instruction::jump_if_equal64(3, libc::AF_INET, 11),
        Instruction::jump_if_not_equal64(3, libc::AF_INET6, none(4)),
        Instruction::load32(2, PACKET, LOCAL_IP6_OFFSET),
        Instruction::jump_if_not_equal64(2, 0, none(6)),
        Instruction::load32(2, PACKET, LOCAL_IP6_OFFSET + 4),
        Instruction::jump_if_not_equal64(2, 0, none(8)),
        Instruction::load32(2, PACKET, LOCAL_IP6_OFFSET + 8),
        Instruction::jump_if_not_equal64(2, 0, none(10)),
        Instruction::load32(2, PACKET, LOCAL_IP6_OFFSET + 12),
        Instruction::jump_if_not_equal64(2, LAST_WORD_OF_LOOPBACK, none(12)),
        Instruction::set64(SELECTED, 1),
        Instruction::jump(4),
        // IPv4.
        Instruction::load32(2, PACKET, LOCAL_IP4_OFFSET),
        Instruction::and64(2, 0xff),
        Instruction::jump_if_not_equal64(2, 127, none(17)),
        Instruction::set64(SELECTED, 0),
    ]
};

/// The attached program. It is detached on drop.
#[derive(Debug)]
pub(super) struct SocketLookup {
    /// Closing the last descriptor of the link detaches the program.
    _link: OwnedFd,
}

impl SocketLookup {
    /// Attaches the program to `namespace`. `sockets` listen there, on IPv4 and IPv6.
    pub(super) fn attach(namespace: BorrowedFd<'_>, sockets: [Option<BorrowedFd<'_>>; 2]) -> io::Result<Self> {
        let link = sk_lookup::attach(namespace, sockets, &SELECTION)?;
        Ok(Self { _link: link })
    }
}
