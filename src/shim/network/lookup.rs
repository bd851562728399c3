//! A program of BPF that brings connections to any loopback port of a network namespace to one
//! listening socket (Linux, `Documentation/bpf/prog_sk_lookup.rst`; since 5.9).
//!
//! The whole program is below; nothing of a pod goes into it. It ends with its descriptor.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;
use nutshell_linux::bpf::Instruction;

/// What may listen: a socket for each family.
const FAMILIES: u32 = 2;

// Fields of `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

// Functions of the kernel (`enum bpf_func_id`).
const MAP_LOOKUP: i32 = 1;
const RELEASE: i32 = 86;
const ASSIGN: i32 = 124;

/// `::1`'s last word as it is in memory.
const LAST_WORD_OF_LOOPBACK: i32 = 1_i32.to_be();

/// For TCP to 127.0.0.0/8 the socket at index 0 of the map, for TCP to ::1 that at 1; for the rest
/// whatever the kernel finds by itself.
const fn program(map: RawFd) -> [Instruction; 36] {
    // To the last two instructions from the one at this index.
    const fn pass(from: i16) -> i16 {
        33 - from
    }
    let [load_map, load_map_end] = Instruction::load_map(1, map);
    [
        Instruction::copy64(6, 1),
        Instruction::load32(2, 6, PROTOCOL),
        Instruction::jump_if_not_equal64(2, libc::IPPROTO_TCP, pass(2)),
        Instruction::load32(3, 6, FAMILY),
        Instruction::jump_if_equal64(3, libc::AF_INET, 11),
        Instruction::jump_if_not_equal64(3, libc::AF_INET6, pass(5)),
        Instruction::load32(2, 6, LOCAL_IP6),
        Instruction::jump_if_not_equal64(2, 0, pass(7)),
        Instruction::load32(2, 6, LOCAL_IP6 + 4),
        Instruction::jump_if_not_equal64(2, 0, pass(9)),
        Instruction::load32(2, 6, LOCAL_IP6 + 8),
        Instruction::jump_if_not_equal64(2, 0, pass(11)),
        Instruction::load32(2, 6, LOCAL_IP6 + 12),
        Instruction::jump_if_not_equal64(2, LAST_WORD_OF_LOOPBACK, pass(13)),
        Instruction::set64(4, 1),
        Instruction::jump(4),
        // IPv4.
        Instruction::load32(2, 6, LOCAL_IP4),
        Instruction::and64(2, 0xff),
        Instruction::jump_if_not_equal64(2, 127, pass(18)),
        Instruction::set64(4, 0),
        // The socket of the index in register 4.
        Instruction::store32(10, -4, 4),
        load_map,
        load_map_end,
        Instruction::copy64(2, 10),
        Instruction::add64(2, -4),
        Instruction::call(MAP_LOOKUP),
        Instruction::jump_if_equal64(0, 0, pass(26)),
        Instruction::copy64(7, 0),
        Instruction::copy64(1, 6),
        Instruction::copy64(2, 7),
        Instruction::set64(3, 0),
        Instruction::call(ASSIGN),
        Instruction::copy64(1, 7),
        Instruction::call(RELEASE),
        Instruction::set64(0, 1),
        Instruction::exit(),
    ]
}

/// The program in its place.
#[derive(Debug)]
pub(super) struct Lookup {
    /// It takes the program away when it is closed.
    _link: OwnedFd,
}

impl Lookup {
    /// For connections in `namespace`; `sockets` listen for IPv4 and, if there is one, IPv6.
    pub(super) fn attach(namespace: BorrowedFd<'_>, sockets: [Option<BorrowedFd<'_>>; 2]) -> io::Result<Self> {
        let map = create_map()?;
        for (key, socket) in (0_u32..).zip(sockets) {
            if let Some(socket) = socket {
                put(&map, key, socket)?;
            }
        }
        let program = load(&program(map.as_raw_fd()))?;
        let link = link(&program, namespace)?;
        Ok(Self { _link: link })
    }
}

// The parts of `union bpf_attr` (bpf(2)) that the commands below take.

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

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const SOCKMAP: u32 = 15;
const SK_LOOKUP_PROGRAM: u32 = 30;
const SK_LOOKUP_ATTACH: u32 = 36;

fn create_map() -> io::Result<OwnedFd> {
    let attribute = MapCreate {
        kind: SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: FAMILIES,
    };
    // SAFETY: the attributes of BPF_MAP_CREATE; the kernel writes nothing.
    unsafe { call(MAP_CREATE, &attribute) }.map(own)
}

fn put(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = i64::from(socket.as_raw_fd());
    let attribute = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_MAP_UPDATE_ELEM; key and value have the map's sizes and outlive the call.
    unsafe { call(MAP_UPDATE, &attribute) }.map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attribute = ProgramLoad {
        kind: SK_LOOKUP_PROGRAM,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_type: SK_LOOKUP_ATTACH,
        ..ProgramLoad::default()
    };
    // SAFETY: the attributes of BPF_PROG_LOAD; instructions and license outlive the call.
    unsafe { call(PROGRAM_LOAD, &attribute) }.map(own)
}

fn link(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attribute = LinkCreate {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        attach_type: SK_LOOKUP_ATTACH,
        flags: 0,
    };
    // SAFETY: the attributes of BPF_LINK_CREATE; the kernel writes nothing.
    unsafe { call(LINK_CREATE, &attribute) }.map(own)
}

/// bpf(2).
///
/// # Safety
///
/// `attribute` is what `command` takes, and the memory that it names is as large as the command needs.
unsafe fn call<T>(command: libc::c_int, attribute: &T) -> io::Result<RawFd> {
    // SAFETY: by this function's own contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this process, and nothing else knows its number yet.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
