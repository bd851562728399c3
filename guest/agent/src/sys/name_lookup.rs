//! A BPF program that directs DNS queries for Docker's resolver to sockets of the agent, which are bound to other ports
//! (kernel, `Documentation/bpf/prog_sk_lookup.rst`). So containers can bind port 53 of all addresses themselves.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nutshell_linux::bpf::Instruction;
use nutshell_protocol::DOCKER_RESOLVER;

use super::check;

// Offsets in `struct bpf_sk_lookup` (`linux/bpf.h`), in bytes.
const FAMILY_OFFSET: i16 = 8;
const PROTOCOL_OFFSET: i16 = 12;
const LOCAL_IP4_OFFSET: i16 = 40;
/// The port is in host byte order, unlike the addresses.
const LOCAL_PORT_OFFSET: i16 = 60;

// Helper functions (`enum bpf_func_id`).
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;

/// Selects the socket at index 0 of the map for UDP, and that at index 1 for TCP. For other addresses the kernel's own
/// lookup continues.
const fn build_program(map: RawFd) -> [Instruction; 28] {
    // The jump from the instruction at this index to the last two, which return `SK_PASS`.
    const fn pass(from: i16) -> i16 {
        25 - from
    }
    let address = i32::from_ne_bytes(DOCKER_RESOLVER.ip().octets());
    let [load_map, load_map_end] = Instruction::load_map(1, map);
    [
        Instruction::copy64(6, 1),
        Instruction::load32(2, 6, LOCAL_PORT_OFFSET),
        Instruction::jump_if_not_equal64(2, DOCKER_RESOLVER.port() as i32, pass(2)),
        Instruction::load32(2, 6, FAMILY_OFFSET),
        Instruction::jump_if_not_equal64(2, libc::AF_INET, pass(4)),
        Instruction::load32(2, 6, LOCAL_IP4_OFFSET),
        Instruction::jump_if_not_equal64(2, address, pass(6)),
        Instruction::load32(2, 6, PROTOCOL_OFFSET),
        Instruction::set64(4, 0),
        Instruction::jump_if_equal64(2, libc::IPPROTO_UDP, 2),
        Instruction::set64(4, 1),
        Instruction::jump_if_not_equal64(2, libc::IPPROTO_TCP, pass(11)),
        // Looks up the socket at the index in register 4, and assigns it to the packet.
        Instruction::store32(10, -4, 4),
        load_map,
        load_map_end,
        Instruction::copy64(2, 10),
        Instruction::add64(2, -4),
        Instruction::call(BPF_FUNC_MAP_LOOKUP_ELEM),
        Instruction::jump_if_equal64(0, 0, pass(18)),
        Instruction::copy64(7, 0),
        Instruction::copy64(1, 6),
        Instruction::copy64(2, 7),
        Instruction::set64(3, 0),
        Instruction::call(BPF_FUNC_SK_ASSIGN),
        Instruction::copy64(1, 7),
        Instruction::call(BPF_FUNC_SK_RELEASE),
        Instruction::set64(0, 1),
        Instruction::exit(),
    ]
}

// Commands, map, program and attach types (`linux/bpf.h`).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

// The parts of `union bpf_attr` that these commands take (bpf(2)).

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// Directs queries to `udp` and `tcp`, sockets in `namespace`, a network namespace, until the last copy of the result
/// is closed.
pub(crate) fn direct_name_queries(
    namespace: BorrowedFd<'_>,
    udp: BorrowedFd<'_>,
    tcp: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let create = MapCreate {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 2,
    };
    // SAFETY: the attributes of BPF_MAP_CREATE; the result is a new descriptor.
    let map = unsafe { OwnedFd::from_raw_fd(bpf(BPF_MAP_CREATE, &create)?) };
    for (key, socket) in [(0_u32, udp), (1, tcp)] {
        let value = i64::from(socket.as_raw_fd());
        let update = MapUpdate {
            map: map.as_raw_fd(),
            padding: 0,
            key: (&raw const key).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        // SAFETY: the attributes of BPF_MAP_UPDATE_ELEM; key and value have the map's sizes and outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    }
    let instructions = build_program(map.as_raw_fd());
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_type: BPF_SK_LOOKUP,
        ..ProgramLoad::default()
    };
    // SAFETY: the attributes of BPF_PROG_LOAD; instructions and license outlive the call. The result is a new
    // descriptor.
    let program = unsafe { OwnedFd::from_raw_fd(bpf(BPF_PROG_LOAD, &load)?) };
    let link = LinkCreate {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_LINK_CREATE; the result is a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(bpf(BPF_LINK_CREATE, &link)?) })
}

/// Calls bpf(2).
///
/// # Safety
///
/// `attribute` must be what `command` takes, and the memory that it points to must be as large as the command needs.
unsafe fn bpf<T>(command: libc::c_int, attribute: &T) -> io::Result<RawFd> {
    // SAFETY: by this function's own contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    check(i32::try_from(result).unwrap_or(-1))
}
