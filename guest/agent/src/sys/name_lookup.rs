//! Directs DNS queries for Docker's resolver to sockets of the agent, which are bound to other ports. So containers can
//! bind port 53 of all addresses themselves.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nutshell_linux::bpf::Instruction;
use nutshell_linux::sk_lookup::{
    self, FAMILY_OFFSET, LOCAL_IP4_OFFSET, LOCAL_PORT_OFFSET, PACKET, PROTOCOL_OFFSET, SELECTED,
};
use nutshell_protocol::DOCKER_RESOLVER;

/// Selects socket 0 for UDP, and socket 1 for TCP.
const SELECTION: [Instruction; 11] = {
    const fn none(from: i16) -> i16 {
        sk_lookup::select_none(from, 11)
    }
    let address = i32::from_ne_bytes(DOCKER_RESOLVER.ip().octets());
    [
        Instruction::load32(2, PACKET, LOCAL_PORT_OFFSET),
        Instruction::jump_if_not_equal64(2, DOCKER_RESOLVER.port() as i32, none(1)),
        Instruction::load32(2, PACKET, FAMILY_OFFSET),
        Instruction::jump_if_not_equal64(2, libc::AF_INET, none(3)),
        Instruction::load32(2, PACKET, LOCAL_IP4_OFFSET),
        Instruction::jump_if_not_equal64(2, address, none(5)),
        Instruction::load32(2, PACKET, PROTOCOL_OFFSET),
        Instruction::set64(SELECTED, 0),
        Instruction::jump_if_equal64(2, libc::IPPROTO_UDP, 2),
        Instruction::set64(SELECTED, 1),
        Instruction::jump_if_not_equal64(2, libc::IPPROTO_TCP, none(10)),
    ]
};

/// Directs queries to `udp` and `tcp`, sockets in `namespace`, a network namespace, until the last copy of the result
/// is closed.
pub(crate) fn direct_name_queries(
    namespace: BorrowedFd<'_>,
    udp: BorrowedFd<'_>,
    tcp: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    sk_lookup::attach(namespace, [Some(udp), Some(tcp)], &SELECTION)
}
