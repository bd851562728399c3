//! A BPF program that directs connections to any loopback port of a network namespace to one listening socket (kernel,
//! `Documentation/bpf/prog_sk_lookup.rst`; since Linux 5.9).
//!
//! The whole program is below; it contains no data of a pod.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;
use nutshell_linux::bpf::Instruction;

/// The size of the map of sockets: one for IPv4, one for IPv6.
const MAX_SOCKETS: u32 = 2;

// Offsets in `struct bpf_sk_lookup` (`linux/bpf.h`), in bytes.
const FAMILY_OFFSET: i16 = 8;
const PROTOCOL_OFFSET: i16 = 12;
const LOCAL_IP4_OFFSET: i16 = 40;
const LOCAL_IP6_OFFSET: i16 = 44;

// Helper functions (`enum bpf_func_id`).
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;

/// The last word of `::1`, in network byte order.
const LAST_WORD_OF_LOOPBACK: i32 = 1_i32.to_be();

/// Selects the socket at index 0 of the map for TCP to 127.0.0.0/8, and that at index 1 for TCP to ::1. For other
/// connections the kernel's own lookup continues.
const fn build_program(map: RawFd) -> [Instruction; 36] {
    // The jump from the instruction at this index to the last two, which return `SK_PASS`.
    const fn pass(from: i16) -> i16 {
        33 - from
    }
    let [load_map, load_map_end] = Instruction::load_map(1, map);
    [
        Instruction::copy64(6, 1),
        Instruction::load32(2, 6, PROTOCOL_OFFSET),
        Instruction::jump_if_not_equal64(2, libc::IPPROTO_TCP, pass(2)),
        Instruction::load32(3, 6, FAMILY_OFFSET),
        Instruction::jump_if_equal64(3, libc::AF_INET, 11),
        Instruction::jump_if_not_equal64(3, libc::AF_INET6, pass(5)),
        Instruction::load32(2, 6, LOCAL_IP6_OFFSET),
        Instruction::jump_if_not_equal64(2, 0, pass(7)),
        Instruction::load32(2, 6, LOCAL_IP6_OFFSET + 4),
        Instruction::jump_if_not_equal64(2, 0, pass(9)),
        Instruction::load32(2, 6, LOCAL_IP6_OFFSET + 8),
        Instruction::jump_if_not_equal64(2, 0, pass(11)),
        Instruction::load32(2, 6, LOCAL_IP6_OFFSET + 12),
        Instruction::jump_if_not_equal64(2, LAST_WORD_OF_LOOPBACK, pass(13)),
        Instruction::set64(4, 1),
        Instruction::jump(4),
        // IPv4.
        Instruction::load32(2, 6, LOCAL_IP4_OFFSET),
        Instruction::and64(2, 0xff),
        Instruction::jump_if_not_equal64(2, 127, pass(18)),
        Instruction::set64(4, 0),
        // Looks up the socket at the index in register 4, and assigns it to the connection.
        Instruction::store32(10, -4, 4),
        load_map,
        load_map_end,
        Instruction::copy64(2, 10),
        Instruction::add64(2, -4),
        Instruction::call(BPF_FUNC_MAP_LOOKUP_ELEM),
        Instruction::jump_if_equal64(0, 0, pass(26)),
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

/// The attached program. Dropped, it is detached.
#[derive(Debug)]
pub(super) struct SocketLookup {
    /// Closing the last descriptor of the link detaches the program.
    _link: OwnedFd,
}

impl SocketLookup {
    /// Attaches the program to `namespace`. `sockets` listen there, on IPv4 and IPv6.
    pub(super) fn attach(namespace: BorrowedFd<'_>, sockets: [Option<BorrowedFd<'_>>; 2]) -> io::Result<Self> {
        let map = create_map()?;
        for (key, socket) in (0_u32..).zip(sockets) {
            if let Some(socket) = socket {
                insert_socket(&map, key, socket)?;
            }
        }
        let program = load_program(&build_program(map.as_raw_fd()))?;
        let link = attach_program(&program, namespace)?;
        Ok(Self { _link: link })
    }
}

// The parts of `union bpf_attr` that the commands below take (bpf(2)).

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

// Commands, map, program and attach types (`linux/bpf.h`).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

fn create_map() -> io::Result<OwnedFd> {
    let attribute = MapCreate {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: MAX_SOCKETS,
    };
    // SAFETY: the attributes of BPF_MAP_CREATE; the kernel writes nothing.
    unsafe { bpf(BPF_MAP_CREATE, &attribute) }.map(own_descriptor)
}

fn insert_socket(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = i64::from(socket.as_raw_fd());
    let attribute = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_MAP_UPDATE_ELEM; key and value have the map's sizes and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attribute) }.map(drop)
}

fn load_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attribute = ProgramLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_type: BPF_SK_LOOKUP,
        ..ProgramLoad::default()
    };
    // SAFETY: the attributes of BPF_PROG_LOAD; instructions and license outlive the call.
    unsafe { bpf(BPF_PROG_LOAD, &attribute) }.map(own_descriptor)
}

fn attach_program(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attribute = LinkCreate {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_LINK_CREATE; the kernel writes nothing.
    unsafe { bpf(BPF_LINK_CREATE, &attribute) }.map(own_descriptor)
}

/// Calls bpf(2).
///
/// # Safety
///
/// `attribute` must be what `command` takes, and the memory that it points to must be as large as the command needs.
unsafe fn bpf<T>(command: libc::c_int, attribute: &T) -> io::Result<RawFd> {
    // SAFETY: by this function's own contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

fn own_descriptor(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this process, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
