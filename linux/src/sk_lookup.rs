//! A BPF program that selects the sockets of a network namespace to which some packets go, instead of those that the
//! kernel would find by address and port (kernel, `Documentation/bpf/prog_sk_lookup.rst`; since Linux 5.9).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::bpf::Instruction;
use crate::bpf_program::{attach_program, create_socket_map, insert_socket, load_program};

/// The register that points to the `struct bpf_sk_lookup` of the packet.
pub const PACKET: u8 = 6;
/// The register for the index of the selected socket.
pub const SELECTED: u8 = 4;

// Offsets in `struct bpf_sk_lookup` (`linux/bpf.h`), in bytes.

/// The address family.
pub const FAMILY_OFFSET: i16 = 8;
/// The protocol, such as `IPPROTO_TCP`.
pub const PROTOCOL_OFFSET: i16 = 12;
/// The destination address, in network byte order.
pub const LOCAL_IP4_OFFSET: i16 = 40;
/// The first of the four words of the destination address, in network byte order.
pub const LOCAL_IP6_OFFSET: i16 = 44;
/// The destination port, in host byte order.
pub const LOCAL_PORT_OFFSET: i16 = 60;

// Program and attach type (`linux/bpf.h`).
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

// Helper functions (`enum bpf_func_id`).
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;

/// Returns the number of instructions over which the instruction at index `from` jumps to select no socket, in a
/// selection of `length` instructions. Then the kernel's own lookup continues.
#[must_use]
pub const fn select_none(from: i16, length: i16) -> i16 {
    // `build_program` appends 16 instructions. The jump leads to the second to last, which sets the result.
    length + 13 - from
}

/// Attaches a program to `namespace`, a network namespace, until the last copy of the result is closed. The
/// instructions of `selection` read the packet in [`PACKET`], and either put the index of one of the `sockets` into
/// [`SELECTED`] and run to their end, or jump by [`select_none`]. A missing socket is not selected.
///
/// # Errors
///
/// The error of bpf(2): the caller lacks `CAP_BPF` or `CAP_NET_ADMIN`, or the kernel refuses the program.
pub fn attach(
    namespace: BorrowedFd<'_>,
    sockets: [Option<BorrowedFd<'_>>; 2],
    selection: &[Instruction],
) -> io::Result<OwnedFd> {
    let map = create_socket_map(2)?;
    for (index, socket) in (0_u32..).zip(sockets) {
        if let Some(socket) = socket {
            insert_socket(&map, index, socket)?;
        }
    }
    let instructions = build_program(selection, map.as_raw_fd());
    let program = load_program(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &instructions)?;
    attach_program(&program, namespace, BPF_SK_LOOKUP)
}

fn build_program(selection: &[Instruction], map: RawFd) -> Vec<Instruction> {
    let [load_map, load_map_end] = Instruction::load_map(1, map);
    let assign = [
        Instruction::store32(10, -4, SELECTED),
        load_map,
        load_map_end,
        Instruction::copy64(2, 10),
        Instruction::add64(2, -4),
        Instruction::call(BPF_FUNC_MAP_LOOKUP_ELEM),
        Instruction::jump_if_equal64(0, 0, 7),
        Instruction::copy64(7, 0),
        Instruction::copy64(1, PACKET),
        Instruction::copy64(2, 7),
        Instruction::set64(3, 0),
        Instruction::call(BPF_FUNC_SK_ASSIGN),
        Instruction::copy64(1, 7),
        Instruction::call(BPF_FUNC_SK_RELEASE),
        // `SK_PASS`.
        Instruction::set64(0, 1),
        Instruction::exit(),
    ];
    [&[Instruction::copy64(PACKET, 1)], selection, &assign].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_to_the_end_reach_the_instruction_that_sets_the_result() {
        let selection = [Instruction::set64(SELECTED, 0), Instruction::set64(SELECTED, 1)];
        let program = build_program(&selection, 0);
        let end = program.len() - 2;
        assert_eq!(program[end], Instruction::set64(0, 1));
        for (from, index) in [(0, 1), (1, 2)] {
            assert_eq!(index + 1 + usize::try_from(select_none(from, 2)).unwrap(), end);
        }
        let lookup = program
            .iter()
            .position(|found| *found == Instruction::jump_if_equal64(0, 0, 7));
        assert_eq!(lookup.unwrap() + 1 + 7, end);
    }
}
